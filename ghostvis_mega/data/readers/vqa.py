"""Questions about pictures: COCO captions, VQAv2, TextVQA and ChartQA, as they are published.

All reference answers are kept for scoring; the one that most people gave is trained.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostvis_mega.data.ingest import BadRow, Row
from ghostvis_mega.data.readers.common import (
    by_id,
    check_folder,
    field,
    image_path,
    json_items,
    list_field,
    make_rows,
    read_json,
    read_object,
    text_field,
    visual_question,
)
from ghostvis_mega.data.readers.meter import Meter
from ghostvis_mega.data.template import RowError
from ghostvis_mega.utils.errors import DataError

CAPTION_PROMPT = "Describe the image in one sentence."


def most_common(answers: list[str]) -> str:
    """The answer given most often; of equals, the one given first."""
    if not answers:
        raise RowError("no_answer", "the row has no answers")
    return Counter(answers).most_common(1)[0][0]


def coco_caption_rows(
    path: Path,
    *,
    images: Path | None,
    limit: int | None = None,
    prompt: str = CAPTION_PROMPT,
    meter: Meter | None = None,
) -> Iterator[Row | BadRow]:
    """`captions_*2017.json`: a row a caption, in the order of `annotations`."""
    check_folder(images)
    pictures, annotations = read_object(path, "images"), read_object(path, "annotations")
    files = by_id(pictures, "id")
    captions: dict[str, list[str]] = {}
    for row in annotations:
        if isinstance(row, dict) and isinstance(row.get("caption"), str):
            captions.setdefault(str(row.get("image_id")), []).append(row["caption"].strip())

    def make(annotation: Any, key: str) -> Row:
        image_id = text_field(annotation, "image_id")
        caption = text_field(annotation, "caption").strip()
        if image_id not in files:
            raise RowError("unknown_image", f"`images` has no id {image_id}")
        return Row(
            key=key,
            turns=visual_question(prompt, caption),
            images=(image_path(files[image_id].get("file_name"), images),),
            answers=tuple(captions.get(image_id, (caption,))),
        )

    yield from make_rows(path.stem, annotations, make, id_field="id", limit=limit, meter=meter)


def vqav2_rows(
    path: Path,
    *,
    annotations: Path,
    images: Path | None,
    limit: int | None = None,
    meter: Meter | None = None,
) -> Iterator[Row | BadRow]:
    """Questions and annotations of VQAv2; pictures are `COCO_{data_subtype}_{image_id:012d}.jpg`.

    Args:
        path: `v2_OpenEnded_mscoco_*_questions.json`.
        annotations: `v2_mscoco_*_annotations.json`.
    """
    check_folder(images)
    questions = read_json(path)
    if not isinstance(questions, dict) or not isinstance(questions.get("questions"), list):
        raise DataError(f"{path} has no list 'questions': it is no questions file of VQAv2")
    subtype = questions.get("data_subtype")
    answers = by_id(read_object(annotations, "annotations"), "question_id")

    def make(question: Any, key: str) -> Row:
        number, image_id = text_field(question, "question_id"), text_field(question, "image_id")
        if not image_id.isdecimal():
            raise RowError("bad_field", f"`image_id` is {image_id!r}, not a whole number")
        if number not in answers:
            raise RowError("no_answer", f"the annotations have no question_id {number}")
        given = [text_field(row, "answer") for row in list_field(answers[number], "answers")]
        name = f"COCO_{subtype}_{int(image_id):012d}.jpg"
        return Row(
            key=key,
            turns=visual_question(text_field(question, "question"), most_common(given)),
            images=(image_path(name, images),),
            answers=tuple(given),
        )

    rows = questions["questions"]
    yield from make_rows(path.stem, rows, make, id_field="question_id", limit=limit, meter=meter)


def textvqa_rows(
    path: Path, *, images: Path | None, limit: int | None = None, meter: Meter | None = None
) -> Iterator[Row | BadRow]:
    """`TextVQA_0.5.1_{train,val}.json`; pictures are `{image_id}.jpg`."""
    check_folder(images)

    def make(row: Any, key: str) -> Row:
        given = [str(answer) for answer in list_field(row, "answers")]
        return Row(
            key=key,
            turns=visual_question(text_field(row, "question"), most_common(given)),
            images=(image_path(f"{text_field(row, 'image_id')}.jpg", images),),
            answers=tuple(given),
        )

    rows = read_object(path, "data")
    yield from make_rows(path.stem, rows, make, id_field="question_id", limit=limit, meter=meter)


def chartqa_rows(
    path: Path, *, images: Path | None, limit: int | None = None, meter: Meter | None = None
) -> Iterator[Row | BadRow]:
    """`{train,val,test}_{human,augmented}.json`: imgname, query, label; pictures in `png/`."""
    check_folder(images)

    def make(row: Any, key: str) -> Row:
        label = text_field(row, "label")
        return Row(
            key=key,
            turns=visual_question(text_field(row, "query"), label),
            images=(image_path(field(row, "imgname"), images),),
            answers=(label,),
        )

    yield from make_rows(path.stem, json_items(path, meter), make, limit=limit)
