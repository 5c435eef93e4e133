"""The pictures and questions inside the easy-vqa package: 64x64 shapes, 13 answers, MIT licence."""

from collections.abc import Iterator
from pathlib import Path

from ghostvis_mega.data.ingest import Row, Source
from ghostvis_mega.data.readers.meter import Meter
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.utils.errors import DataError, MissingDependencyError

NAME = "easy-vqa"
SPLITS = ("train", "test")


def _load(split: str) -> tuple[tuple[list[str], list[str], list[int]], dict[int, str]]:
    """((questions, answers, image ids), image id -> file) of one split."""
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingDependencyError(
            "easy-vqa", needed_for="The easy-vqa dataset", extra="demo"
        ) from error
    if split == "train":
        return easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    if split == "test":
        return easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    raise DataError(f"easy-vqa has no split {split!r}: use {' or '.join(SPLITS)}")


def easy_vqa_rows(
    split: str, *, limit: int | None = None, meter: Meter | None = None
) -> Iterator[Row]:
    """One row a question, in the package's order; `limit` keeps the first rows only."""
    (questions, answers, image_ids), files = _load(split)
    asked = list(zip(questions, answers, image_ids, strict=True))[:limit]
    meter = meter or Meter()
    meter.expect(len(asked))
    for number, (question, answer, image_id) in enumerate(asked):
        yield Row(
            key=f"{NAME}/{split}/{number:06d}",
            turns=(Turn("user", (ImagePart(), question)), Turn("assistant", (answer,))),
            images=(Path(files[image_id]),),
            answers=(answer,),
        )
        meter.add(1)


def easy_vqa_source(split: str, *, limit: int | None = None) -> Source:
    """The split as a source for `ingest`."""
    return Source(name=f"{NAME}/{split}", rows=easy_vqa_rows(split, limit=limit), license="MIT")


def easy_vqa_text(split: str) -> Iterator[str]:
    """Questions and answers, for a tokenizer."""
    (questions, answers, _), _ = _load(split)
    yield from questions
    yield from answers
