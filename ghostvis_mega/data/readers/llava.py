"""LLaVA / ShareGPT conversations in JSON or JSON lines, with a folder of images.

    {"id": "1", "image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

`image` may be a list, `images` is read too, and rows of text have neither. One line break beside
"<image>" belongs to the notation, not to the text, and is dropped. Addresses are never fetched.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostvis_mega.data.ingest import BadRow, Row, Source
from ghostvis_mega.data.readers.common import check_folder, documents, image_path
from ghostvis_mega.data.readers.meter import Meter
from ghostvis_mega.data.template import ImagePart, RowError, Turn

PLACEHOLDER = "<image>"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def _parts(text: str) -> tuple[str | ImagePart, ...]:
    """Text split at its placeholders, without the line break that notation puts beside them."""
    pieces = text.split(PLACEHOLDER)
    parts: list[str | ImagePart] = []
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append(ImagePart())
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(piece)
    return tuple(parts)


def conversation_turn(number: int, turn: Any) -> Turn:
    """One turn `from`/`value` or `role`/`content`; RowError if it is none."""
    if not isinstance(turn, dict):
        raise RowError("bad_turn", f"turn {number} is a JSON {type(turn).__name__}, not an object")
    speaker = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise RowError("bad_turn", f"turn {number} needs the texts `from` and `value`")
    return Turn(_ROLES.get(speaker.lower(), speaker), _parts(text))


def _row(document: Any, *, key: str, folder: Path | None) -> Row:
    if not isinstance(document, dict):
        raise RowError("bad_row", f"the row is a JSON {type(document).__name__}, not an object")
    conversation = document.get("conversations", document.get("messages"))
    if not isinstance(conversation, list):
        raise RowError("bad_row", "the row has no list `conversations`")
    names = document.get("image", document.get("images"))
    if names is None:
        names = []
    elif not isinstance(names, list):
        names = [names]
    return Row(
        key=key,
        turns=tuple(conversation_turn(number, turn) for number, turn in enumerate(conversation)),
        images=tuple(image_path(name, folder) for name in names),
    )


def llava_rows(
    path: Path,
    *,
    image_folder: Path | None,
    limit: int | None = None,
    meter: Meter | None = None,
) -> Iterator[Row | BadRow]:
    """Rows of a file, in order.

    Raises:
        DataError: the file cannot be read, or its rows have images and there is no folder.
    """
    check_folder(image_folder)
    for number, document, problem in documents(path, meter):
        if limit is not None and number >= limit:
            return
        name = document.get("id") if isinstance(document, dict) else None
        key = f"{path.stem}/{number:06d}" if name is None else f"{path.stem}/{number:06d}/{name}"
        if problem:
            yield BadRow(key=key, reason="bad_json", detail=problem)
            continue
        try:
            yield _row(document, key=key, folder=image_folder)
        except RowError as error:
            yield BadRow(key=key, reason=error.reason, detail=error.detail)


def llava_source(path: Path, *, image_folder: Path | None, limit: int | None = None) -> Source:
    """The file as a source for `ingest`."""
    return Source(name=path.stem, rows=llava_rows(path, image_folder=image_folder, limit=limit))


def llava_text(path: Path) -> Iterator[str]:
    """All text of a file, for a tokenizer; rows that cannot be read are passed over."""
    for _, document, _ in documents(path):
        conversation = document.get("conversations") if isinstance(document, dict) else None
        for number, turn in enumerate(conversation if isinstance(conversation, list) else []):
            try:
                parts = conversation_turn(number, turn).parts
                yield from (part for part in parts if isinstance(part, str))
            except RowError:  # the ledger of ingest names it; a tokenizer needs only the rest
                continue
