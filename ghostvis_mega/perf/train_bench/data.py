"""Prepared datasets that the presets of the training benchmark read.

Text is random tokens in samples of one length, so that sequences are full without any padding.
Pictures are real ones out of packages: easy-vqa's with all their questions as one conversation, as
LLaVA asks about a picture of VQAv2, and where they are installed Tux Paint's stamps (drawings and
photographs of many sizes) with their captions.
"""

import logging
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.readers.easy_vqa import easy_vqa_rows, easy_vqa_text
from ghostvis_mega.data.template import ROLES, ImagePart, Turn
from ghostvis_mega.data.tokenizer import train_tokenizer
from ghostvis_mega.perf.synthetic_data import write_synthetic
from ghostvis_mega.perf.train_bench.plans import PictureNeed, TextNeed

log = logging.getLogger(__name__)

STAMPS = Path("/usr/share/tuxpaint/stamps")
_VOCABULARY = 1024
_CAPTION = "What is this?"


def prepare(needs: list[TextNeed | PictureNeed]) -> None:
    """Write the datasets that are not there yet."""
    for need in needs:
        if need.path.exists():
            log.info("%s is there and used as it is", need.path)
            continue
        log.info("writing %s", need.path)
        if isinstance(need, TextNeed):
            write_text(need)
        else:
            write_pictures(need)


def write_text(need: TextNeed) -> None:
    """Samples of `sample_length` random tokens, all of them trained.

    Tokens come from a quarter of the vocabulary, so that there is something to learn.
    """
    write_synthetic(
        need.path,
        text_lengths=np.full(need.samples, need.sample_length, dtype=np.int64),
        image_of=np.full(need.samples, -1, dtype=np.int64),
        vocab_size=max(16, need.vocab_size // 4),
        train_all=True,
    )


def write_pictures(need: PictureNeed) -> None:
    """Conversations about easy-vqa's pictures, and captions of stamps."""
    tokenizer_file = need.path.with_suffix(".model")
    wanted = need.pictures is None
    stamps = list(stamp_rows(STAMPS)) if wanted and STAMPS.is_dir() else []
    if wanted and not stamps:
        log.info("%s is not there (tuxpaint-stamps-default): pictures are easy-vqa's alone", STAMPS)
    captions = (str(row.turns[1].parts[0]) for row in stamps)
    texts = dict.fromkeys((*easy_vqa_text("train"), *captions, _CAPTION, *ROLES))
    need.path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = _VOCABULARY if stamps else _VOCABULARY // 2
    tokenizer = train_tokenizer(texts, vocab_size=vocabulary, path=tokenizer_file)
    sources = [Source(name="easy-vqa", rows=conversations(need.pictures), license="MIT")]
    if stamps:
        sources.append(Source(name="tuxpaint-stamps", rows=iter(stamps), license="GPL-2"))
    ingest(sources, tokenizer=tokenizer, path=need.path)


def conversations(pictures: int | None) -> Iterator[Row]:
    """One row a picture of easy-vqa: its questions, one after the other."""
    by_picture = sorted(easy_vqa_rows("train"), key=lambda row: str(row.images[0]))
    for number, (_, asked) in enumerate(groupby(by_picture, key=lambda row: row.images[0])):
        if pictures is not None and number >= pictures:
            return
        rows = list(asked)
        first, *more = rows
        turns = [*first.turns]
        for row in more:
            # The picture is shown once, before the first question.
            words = tuple(part for part in row.turns[0].parts if not isinstance(part, ImagePart))
            turns += [Turn("user", words), row.turns[1]]
        yield Row(key=f"{first.key}+{len(more)}", turns=tuple(turns), images=first.images)


def stamp_rows(folder: Path) -> Iterator[Row]:
    """One row a stamp that has a caption: the first line of its text file."""
    for image in sorted(folder.rglob("*.png")):
        text = image.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").partition("\n")[0] if text.is_file() else ""
        if caption.strip():
            yield Row(
                key=image.relative_to(folder).as_posix(),
                turns=(
                    Turn("user", (ImagePart(), _CAPTION)),
                    Turn("assistant", (caption.strip(),)),
                ),
                images=(image,),
            )
