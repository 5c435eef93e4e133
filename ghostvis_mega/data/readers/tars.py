"""Walks tars as streams of members. Nothing is extracted, and a tar is never trusted.

Only regular files come out. Links, devices, sparse files, names that leave the folder, sizes beyond
the limit or beyond the end of the file are reported and passed over; a broken header ends the tar.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ghostvis_mega.data.encode import MAX_IMAGE_BYTES
from ghostvis_mega.data.readers.meter import Meter
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import open_regular

_BLOCK = 512
_MAX_NAME_BYTES = 64 * 1024
_REGULAR = b"0\0"
_DIRECTORY = b"5"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True)
class TarMember:
    """One regular file."""

    name: str
    data: bytes


@dataclass(frozen=True)
class BadMember:
    """Something that is not read; `fatal` ends the tar."""

    name: str
    reason: str
    detail: str
    fatal: bool = False


def _number(field: bytes) -> int:
    """An octal field, or base 256 with the top bit set; ValueError if it is neither."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("negative or oversized number")
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if not text.isalnum() and text:
        raise ValueError("not octal")
    return int(text or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError("not a size")
    return int(text)


def _checksum_is_right(header: bytes) -> bool:
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 8 * 0x20


def _pax(data: bytes) -> dict[str, str]:
    """Records of an extended header; ValueError if they are broken."""
    records = {}
    while data:
        length_text, space, _ = data.partition(b" ")
        length = int(length_text) if length_text.isdigit() else 0
        if not space or not len(length_text) + 1 < length <= len(data):
            raise ValueError("broken extended header")
        record = data[len(length_text) + 1 : length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals:
            raise ValueError("broken extended header")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[length:]
    return records


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace")


def unsafe_name(name: str) -> bool:
    """The name is absolute or leaves its folder."""
    path = PurePosixPath(name)
    return not name or path.is_absolute() or ".." in path.parts or "\0" in name


def walk_tar(path: Path, meter: Meter | None = None) -> Iterator[TarMember | BadMember]:
    """Members of an uncompressed tar in order.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        size = path.stat().st_size
        with open(open_regular(path), "rb") as file, (meter or Meter()).reading(file, size):
            yield from _walk(file, size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _walk(file: BinaryIO, total: int) -> Iterator[TarMember | BadMember]:
    records: dict[str, str] = {}
    while True:
        offset = file.tell()
        header = file.read(_BLOCK)
        if not header.strip(b"\0"):
            if len(header) < _BLOCK:
                detail = f"the tar ends at byte {total} without an end mark"
                yield BadMember("", "truncated_tar", detail, fatal=True)
            return
        if len(header) < _BLOCK or not _checksum_is_right(header):
            detail = f"no tar header at byte {offset}"
            yield BadMember("", "broken_tar", detail, fatal=True)
            return
        try:
            size = _decimal(records["size"]) if "size" in records else _number(header[124:136])
        except ValueError:
            yield BadMember(_name(header), "broken_tar", "its size is no number", fatal=True)
            return
        kind, begin = header[156:157], offset + _BLOCK
        end = begin + size + -size % _BLOCK
        name = records.get("path") or _name(header)
        # Links and directories have a size field of their own meaning and no data.
        if kind in b"123456":
            size, end = 0, begin
        if begin + size > total:
            detail = f"{size} bytes at {begin} of a tar of {total}"
            yield BadMember(name, "truncated_tar", detail, fatal=True)
            return
        if kind in (b"x", b"g", b"L", b"K"):
            try:
                if size > _MAX_NAME_BYTES:
                    raise ValueError(f"an extended header of {size} bytes")
                found = _extended(kind, file.read(size))
            except ValueError as error:
                yield BadMember(name, "broken_tar", str(error), fatal=True)
                return
            records = {**records, **found}
        else:
            yield from _member(file, kind, name, size)
            records = {}
        file.seek(end)


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """What a header about the next one says; global ones and link targets say nothing here."""
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "replace")}
    if kind == b"x":
        return {key: value for key, value in _pax(data).items() if key in ("path", "size")}
    return {}


def _member(file: BinaryIO, kind: bytes, name: str, size: int) -> Iterator[TarMember | BadMember]:
    if kind == _DIRECTORY:
        return
    if kind not in (b"0", b"\0", b"7"):
        what = _KINDS.get(kind, f"of the unknown kind {kind!r}")
        yield BadMember(name, "not_a_file", f"{name!r} is {what}; only files are read")
    elif unsafe_name(name):
        yield BadMember(name, "unsafe_name", f"{name!r} leaves the folder")
    elif size > MAX_IMAGE_BYTES:
        detail = f"{name!r} has {size} bytes, at most {MAX_IMAGE_BYTES} are read"
        yield BadMember(name, "too_large", detail)
    else:
        yield TarMember(name, file.read(size))
