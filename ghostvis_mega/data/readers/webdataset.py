"""WebDataset tars: files of one sample stand together and share a name up to the first dot.

Pictures are KEY.jpg, KEY.png or KEY.webp (or KEY.0.jpg, KEY.1.png, ...); the text is one of
- KEY.json with `messages` whose content is a list of text and image parts, as `export webdataset`
  writes it, or with LLaVA's `conversations`, or with a text `caption`,
- KEY.txt, a caption.
Tars are read as streams and never extracted; addresses in the JSON are never fetched.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostvis_mega.data.ingest import BadRow, Row
from ghostvis_mega.data.readers.common import list_field, parse, text_field, visual_question
from ghostvis_mega.data.readers.llava import conversation_turn
from ghostvis_mega.data.readers.meter import Meter, size_of
from ghostvis_mega.data.readers.tars import BadMember, TarMember, walk_tar
from ghostvis_mega.data.template import MAX_IMAGES, ImagePart, RowError, Turn
from ghostvis_mega.utils.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_SAMPLE_BYTES = 1 << 30


@dataclass
class _Sample:
    """Files of one key so far."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problem: RowError | None = None
    size: int = 0

    def add(self, part: str, data: bytes) -> None:
        """Take one file; too many or repeated ones make the sample bad."""
        self.size += len(data)
        if part in self.parts:
            self.problem = RowError("repeated_file", f"there are two files {self.key}.{part}")
        elif self.size > MAX_SAMPLE_BYTES or len(self.parts) > MAX_IMAGES:
            self.problem = RowError("too_large", f"more than {MAX_SAMPLE_BYTES} bytes or files")
            self.parts.clear()
        else:
            self.parts[part] = data


def _split_name(name: str) -> tuple[str, str]:
    """(key, part) of a member: the part begins at the first dot of the last name."""
    folder, slash, file = name.rpartition("/")
    stem, _, part = file.partition(".")
    return f"{folder}{slash}{stem}", part


def _samples(path: Path, meter: Meter) -> Iterator[_Sample | BadMember]:
    """Samples of one tar and what is wrong with the tar, in order."""
    current: _Sample | None = None
    for member in walk_tar(path, meter):
        key, part = _split_name(member.name)
        if isinstance(member, BadMember):
            # A sample that loses a file is no sample any more.
            if current is not None and current.key == key:
                current.problem = RowError(member.reason, member.detail)
                continue
            if current is not None and not member.fatal:
                yield current
                current = None
            if member.fatal and current is not None:
                current.problem = RowError(member.reason, member.detail)
                yield current
                current = None
            if member.fatal or not part:
                yield member
            else:
                current = _Sample(key, problem=RowError(member.reason, member.detail))
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = _Sample(key)
        assert isinstance(member, TarMember)
        current.add(part.lower(), member.data)
    if current is not None:
        yield current


def _order(part: str) -> tuple[int, str]:
    number, dot, _ = part.partition(".")
    return (int(number) if dot and number.isdecimal() and len(number) < 10 else -1), part


def _pictures(parts: dict[str, bytes]) -> list[str]:
    """Names of the pictures in their order."""
    return sorted((part for part in parts if part.rpartition(".")[2] in PICTURES), key=_order)


def _content_turn(turn: Any, names: list[str], order: list[str]) -> Turn:
    """A turn of text and image parts; pictures that it shows are added to `order`."""
    role, parts = text_field(turn, "role"), []
    for part in list_field(turn, "content"):
        kind = text_field(part, "type")
        if kind == "text":
            parts.append(text_field(part, "text"))
        elif kind == "image":
            index = part.get("index", len(order))
            if not isinstance(index, int) or not 0 <= index < len(names):
                raise RowError("missing_image", f"picture {index!r} of {len(names)} is shown")
            order.append(names[index])
            parts.append(ImagePart())
        elif kind == "image_url":
            raise RowError(
                "image_is_url", "addresses are not fetched, put the picture into the tar"
            )
        else:
            raise RowError("bad_turn", f"a part has the type {kind!r}, not text or image")
    return Turn(role, tuple(parts))


def _described(document: Any, names: list[str], prompt: str) -> tuple[tuple[Turn, ...], list[str]]:
    """(turns, names of their pictures in reading order) of a KEY.json."""
    if not isinstance(document, dict):
        raise RowError("bad_row", f"the JSON is a {type(document).__name__}, not an object")
    if "messages" in document and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), list)
        for turn in list_field(document, "messages")
    ):
        order: list[str] = []
        listed = document.get("images", names)
        if not isinstance(listed, list) or sorted(map(str, listed)) != sorted(names):
            raise RowError("missing_image", f"the JSON lists {listed!r}, the tar has {names}")
        turns = tuple(_content_turn(turn, listed, order) for turn in document["messages"])
        return turns, order
    for name in ("conversations", "messages"):
        if name in document:
            rows = enumerate(list_field(document, name))
            return tuple(conversation_turn(number, turn) for number, turn in rows), names
    if "caption" in document:
        return visual_question(prompt, text_field(document, "caption")), names
    raise RowError("no_text", "the JSON has neither messages, conversations nor caption")


def _row(sample: _Sample, key: str, prompt: str) -> Row:
    if sample.problem is not None:
        raise sample.problem
    names = _pictures(sample.parts)
    answers: tuple[str, ...] = ()
    if "json" in sample.parts:
        document, problem = parse(sample.parts["json"])
        if problem:
            raise RowError("bad_json", problem)
        turns, order = _described(document, names, prompt)
        key, answers = _identity(document, key)
    elif "txt" in sample.parts:
        try:
            caption = sample.parts["txt"].decode().strip()
        except UnicodeDecodeError as error:
            raise RowError("bad_text", f"{sample.key}.txt: {error.reason}") from error
        turns, order = visual_question(prompt, caption), names
    else:
        raise RowError("no_text", f"the sample has {', '.join(sorted(sample.parts)) or 'no file'}")
    return Row(key, turns, tuple(sample.parts[name] for name in order), answers)


def _identity(document: Any, key: str) -> tuple[str, tuple[str, ...]]:
    """Key and answers that the JSON names, else the key of the tar."""
    own, answers = document.get("key"), document.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
        raise RowError("bad_field", "`answers` is not a list of texts")
    return own if isinstance(own, str) and own else key, tuple(answers)


def webdataset_rows(
    path: Path, *, prompt: str, limit: int | None = None, meter: Meter | None = None
) -> Iterator[Row | BadRow]:
    """Rows of a tar, or of all .tar files of a folder in the order of their names.

    Args:
        prompt: the question that captions answer.

    Raises:
        DataError: a file cannot be read, or the folder holds no tar.
    """
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise DataError(f"{path} holds no .tar")
    count, meter = 0, meter or Meter()
    meter.expect(sum(size_of(tar) for tar in tars))
    for tar in tars:
        for sample in _samples(tar, meter):
            if limit is not None and count >= limit:
                return
            count += 1
            key = f"{tar.stem}/{sample.name if isinstance(sample, BadMember) else sample.key}"
            if isinstance(sample, BadMember):
                yield BadRow(key, sample.reason, sample.detail)
                continue
            try:
                yield _row(sample, key, prompt)
            except RowError as error:
                yield BadRow(key, error.reason, error.detail)
