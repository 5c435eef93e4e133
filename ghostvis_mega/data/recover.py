"""The text that a dataset's tokens spell, and whether that is the text which was ingested."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ghostvis_mega.data.dataset import Dataset, Sample
from ghostvis_mega.data.encode import BadRow, Row
from ghostvis_mega.data.layout import Role
from ghostvis_mega.data.template import DOCUMENT, ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer

_PART = re.compile(r"(?P<document>.*)#(?P<number>\d+)", re.DOTALL)
_LOST = "\ufffd"
_NORMALIZER_SPEC, _CHARSMAP = 3, 2


def turns_of(tokenizer: Tokenizer, sample: Sample) -> list[Turn]:
    """The conversation that a sample's spans and tokens spell."""
    turns = []
    for span in sample.spans[sample.spans["role"] != Role.EOS]:
        start = int(span["start"])
        end = start + int(span["len"])
        parts: list[str | ImagePart] = []
        images = [place for place in sample.image_positions if start <= place < end]
        for place in [*images, end]:
            if text := tokenizer.decode(sample.tokens[start:place].tolist()):
                parts.append(text)
            if place < end:
                parts.append(ImagePart())
            start = place + 1
        turns.append(Turn(Role(int(span["role"])).name.lower(), tuple(parts)))
    return turns


# --- tokenizers


def irreversible(tokenizer: Tokenizer) -> str | None:
    """Why decoding need not give back the text that was encoded; None if it always does."""
    if tokenizer.kind == "tiktoken":
        return None  # ranks are of bytes, and all of them
    if tokenizer.kind == "sentencepiece":
        if _has_charsmap(tokenizer.path.read_bytes()):
            return "its SentencePiece model normalises text (precompiled_charsmap)"
        return None  # byte fallback is required, and spaces are kept, when it is loaded
    return _irreversible_json(tokenizer.path)


def _irreversible_json(path: Path) -> str | None:
    document = json.loads(path.read_text(encoding="utf-8"))
    if (normalizer := document.get("normalizer")) is not None:
        return f"its tokenizer.json normalises text ({normalizer.get('type')})"
    decoder = (document.get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        return f"its tokenizer.json does not decode bytes (decoder {decoder}, not ByteLevel)"
    cutter = document.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers", [cutter])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return "its tokenizer.json does not encode bytes (no pre-tokenizer ByteLevel)"
    for step in steps:
        if step.get("add_prefix_space"):
            return "its tokenizer.json puts a space before the text (add_prefix_space)"
        if step.get("behavior") == "Removed":
            return "its tokenizer.json removes text (a pre-tokenizer with behavior Removed)"
    for piece in document.get("added_tokens") or []:
        if not piece.get("special") and (piece.get("lstrip") or piece.get("rstrip")):
            return f"its tokenizer.json removes spaces beside {piece.get('content')!r}"
    return None


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Fields of a protocol-buffer message: number and raw value."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield tag >> 3, data[place : place + size]
        place += size


def _has_charsmap(model: bytes) -> bool:
    """A ModelProto whose normalizer_spec holds a table of replacements."""
    return any(
        number == _NORMALIZER_SPEC
        and isinstance(spec, bytes)
        and any(inner == _CHARSMAP and value for inner, value in _fields(spec))
        for number, spec in _fields(model)
    )


# --- rows


def recover_rows(dataset: Dataset, source: int) -> Iterator[Row | BadRow]:
    """The rows of one source of a dataset; images are ids of its pictures.

    Parts of one document are joined. What cannot be recovered whole is a `BadRow`.

    Raises:
        DataError: a sample is damaged.
    """
    chosen = np.flatnonzero(dataset.sample_index["source"] == source)
    parts: list[Sample] = []
    for index in chosen.tolist():
        sample = dataset.sample(index)
        if not _continues(parts, sample):
            yield from _row(dataset.tokenizer, parts)
            parts = []
        parts.append(sample)
    yield from _row(dataset.tokenizer, parts)


def _continues(parts: list[Sample], sample: Sample) -> bool:
    """`sample` is the next part of the document that `parts` begin."""
    if not parts or len(sample.spans) == 0 or sample.spans["role"][0] not in (Role.TEXT, Role.EOS):
        return False
    before, now = _PART.fullmatch(parts[-1].key), _PART.fullmatch(sample.key)
    if before is None or now is None or before["document"] != now["document"]:
        return False
    ended = Role.EOS in parts[-1].spans["role"]
    return not ended and int(now["number"]) == int(before["number"]) + 1


def _row(tokenizer: Tokenizer, parts: list[Sample]) -> Iterator[Row | BadRow]:
    if not parts:
        return
    first = parts[0]
    match = _PART.fullmatch(first.key)
    if len(first.spans) == 0 or first.spans["role"][0] in (Role.TEXT, Role.EOS):
        key = match["document"] if match and len(parts) > 1 else first.key
        yield _document(tokenizer, key, parts)
        return
    turns = turns_of(tokenizer, first)
    if any(_LOST in turn.text for turn in turns) and not _same_text(tokenizer, first, turns):
        yield BadRow(first.key, "text_lost", "its tokens are not valid UTF-8")
        return
    yield Row(first.key, tuple(turns), first.image_ids, first.answers)


def _document(tokenizer: Tokenizer, key: str, parts: list[Sample]) -> Row | BadRow:
    """One document from all of its parts."""
    match = _PART.fullmatch(parts[0].key)
    if match is not None and int(match["number"]) > 0:
        return BadRow(parts[0].key, "document_torn", "the parts before this one are missing")
    if match is not None and Role.EOS not in parts[-1].spans["role"]:
        return BadRow(key, "document_torn", "its last part is missing, or it has no end token")
    ids = [
        token
        for part in parts
        for span in part.spans[part.spans["role"] == Role.TEXT]
        for token in part.tokens[int(span["start"]) : int(span["start"]) + int(span["len"])]
    ]
    text = tokenizer.decode(ids)
    if _LOST in text and tokenizer.encode(text) != [int(token) for token in ids]:
        return BadRow(key, "text_lost", "its tokens are not valid UTF-8, or a part is missing")
    if tokenizer.has_special(ids):
        return BadRow(key, "special_inside", "a special token stands inside the document")
    return Row(key, (Turn(DOCUMENT, (text,)),))


def _same_text(tokenizer: Tokenizer, sample: Sample, turns: list[Turn]) -> bool:
    """The tokens between images are those that the text gives."""
    stored = [
        int(token)
        for span in sample.spans[sample.spans["role"] != Role.EOS]
        for token in sample.tokens[int(span["start"]) : int(span["start"]) + int(span["len"])]
    ]
    image = tokenizer.specials["image"]
    given = [
        token
        for turn in turns
        for part in turn.parts
        for token in ([image] if isinstance(part, ImagePart) else tokenizer.encode(part))
    ]
    return stored == given
