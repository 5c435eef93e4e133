"""What readers share: JSON read row by row, image names that stay in their folder."""

import json
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from ghostvis_mega.data.ingest import BadRow, Row
from ghostvis_mega.data.readers.meter import Meter
from ghostvis_mega.data.template import ImagePart, RowError, Turn
from ghostvis_mega.utils.errors import DataError, MissingDependencyError

_CHUNK_CHARS = 1 << 20
_BATCH_ROWS = 1024
_FREE_TO_UNFOLD = 64 << 20
_MOST_UNFOLDING = 1000
"""Times that a parquet column may grow beyond `_FREE_TO_UNFOLD` bytes."""


def parse(data: bytes | str) -> tuple[Any, str]:
    """(value or None, what is wrong with it)."""
    try:
        return json.loads(data), ""
    except (ValueError, RecursionError) as error:
        return None, str(error) or type(error).__name__


def documents(path: Path, meter: Meter | None = None) -> Iterator[tuple[int, Any, str]]:
    """(row number, parsed row or None, what is wrong with it) of JSON lines or of a JSON list.

    Bytes of a list that are no UTF-8 stay in their row, which is refused for them.

    Raises:
        DataError: the file cannot be read, or it is no list of rows.
    """
    meter = meter or Meter()
    try:
        size = path.stat().st_size
        meter.expect(size)
        if path.suffix.lower() == ".jsonl":
            with open(path, "rb") as file, meter.reading(file, size):
                for number, line in enumerate(file):
                    if line.strip():
                        yield number, *parse(line)
        else:
            with (
                open(path, encoding="utf-8-sig", errors="surrogateescape") as file,
                meter.reading(file, size),
            ):
                yield from ((n, row, "") for n, row in enumerate(_stream_list(file)))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not valid JSON ({error}); JSON lines need the ending .jsonl"
        ) from error


def json_items(path: Path, meter: Meter | None = None) -> Iterator[Any]:
    """Rows of `documents` for `make_rows`; a broken line is the RowError that says so."""
    for _, item, problem in documents(path, meter):
        yield RowError("bad_json", problem) if problem else item


def _stream_list(file: TextIO) -> Iterator[Any]:
    """Items of a JSON list, one at a time, so that a file may be larger than the memory.

    Raises:
        ValueError: the file is no JSON, or no list.
    """
    decoder = json.JSONDecoder()
    text = file.read(_CHUNK_CHARS)
    while not text.strip() and (chunk := file.read(_CHUNK_CHARS)):
        text += chunk
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        value, _ = decoder.raw_decode(text[start:] + file.read())
        raise DataError(f"{file.name} holds a JSON {type(value).__name__}, expected a list of rows")
    position, first = start + 1, True
    while True:
        position = _skip_space(text, position)
        # An item counts once the sign behind it is there: a number may go on in the next chunk.
        try:
            if text[position : position + 1] == "]":
                rest = text[position + 1 :] + file.read()
                if rest.strip():
                    raise ValueError("there is text after the list")
                return
            begin = position
            if not first:
                if text[position : position + 1] != ",":
                    raise json.JSONDecodeError("expected , or ]", text, position)
                begin = _skip_space(text, position + 1)
            item, end = decoder.raw_decode(text, begin)
            after = _skip_space(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, end)
        except json.JSONDecodeError:
            if not (chunk := file.read(max(_CHUNK_CHARS, len(text)))):
                raise
            text, position = text[position:] + chunk, 0
            continue
        yield item
        first, position = False, end


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def read_object(path: Path, field: str) -> list[Any]:
    """The list `field` of a JSON object that fills a file; DataError if it is not there."""
    document = read_json(path)
    rows = document.get(field) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path} has no list {field!r}: it is another file than this format has")
    return rows


def read_json(path: Path) -> Any:
    """A whole JSON file; DataError if it cannot be read. Bytes that are no UTF-8 are kept."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        document, problem = parse(text)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if problem:
        raise DataError(f"{path} is not valid JSON ({problem})")
    return document


def parquet_rows(
    path: Path,
    columns: tuple[str, ...],
    optional: tuple[str, ...] = (),
    meter: Meter | None = None,
) -> Iterator:
    """Rows of a parquet file as dictionaries, a batch in memory at a time.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        DataError: the file is damaged or lacks one of `columns`.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "pyarrow", needed_for="Reading parquet", extra="data"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            if missing := [name for name in columns if name not in present]:
                raise DataError(f"{path} has no column {missing[0]!r}, only {', '.join(present)}")
            _check_unfolding(path, file.metadata)
            meter = meter or Meter()
            meter.expect(file.metadata.num_rows)
            wanted = [name for name in (*columns, *optional) if name in present]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                yield from batch.to_pylist()
                meter.add(batch.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable parquet file ({error})") from error


def _check_unfolding(path: Path, metadata: Any) -> None:
    """DataError if a column unfolds as no text or picture does: a batch of it would fill memory."""
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            column = metadata.row_group(group).column(place)
            size, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
            if size > max(_FREE_TO_UNFOLD, _MOST_UNFOLDING * packed):
                raise DataError(
                    f"{path}: column {column.path_in_schema!r} unfolds from {packed} to {size} "
                    f"bytes; more than {_MOST_UNFOLDING} times is a trap, not data"
                )


def check_folder(folder: Path | None) -> None:
    """DataError if an image folder is given and is none."""
    if folder is not None and not folder.is_dir():
        raise DataError(f"image folder {folder} is not a directory")


def image_path(name: Any, folder: Path | None) -> Path:
    """File of an image; names from a data file must not leave the folder."""
    if not isinstance(name, str) or not name:
        raise RowError("bad_image_name", f"image name {name!r} is not a text")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise RowError("bad_image_name", f"image name {name!r}: {error.reason}") from error
    if "://" in name or name.startswith("data:"):
        raise RowError("image_is_url", f"{name[:80]}: addresses are not fetched, download it first")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise RowError("image_outside_folder", f"{name!r} leaves the image folder")
    if folder is None:
        raise DataError("the rows have images: give their folder with --images")
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # links that lead to each other: RuntimeError
        raise RowError("missing_image", f"{name!r} cannot be followed to a file") from error
    if not inside:
        raise RowError("image_outside_folder", f"{name!r} links out of the image folder")
    return path


def field(row: Any, name: str) -> Any:
    """One field of a row; RowError if it is not there."""
    if not isinstance(row, dict):
        raise RowError("bad_row", f"the row is a {type(row).__name__}, not an object")
    if row.get(name) is None:
        raise RowError("missing_field", f"the row has no `{name}`")
    return row[name]


def text_field(row: Any, name: str) -> str:
    """One text of a row; numbers count as text."""
    value = field(row, name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("bad_field", f"`{name}` is a {type(value).__name__}, not a text")
    return str(value)


def list_field(row: Any, name: str) -> list[Any]:
    """One list of a row."""
    value = field(row, name)
    if not isinstance(value, list):
        raise RowError("bad_field", f"`{name}` is a {type(value).__name__}, not a list")
    return value


def visual_question(question: str, answer: str) -> tuple[Turn, ...]:
    """One picture, one question, one answer."""
    return Turn("user", (ImagePart(), question)), Turn("assistant", (answer,))


def by_id(rows: list[Any], name: str) -> dict[str, dict[str, Any]]:
    """Rows by their field `name`, as text; what is no row is passed over, its user will miss it."""
    return {str(row[name]): row for row in rows if isinstance(row, dict) and name in row}


def make_rows(
    name: str,
    items: Iterable[Any],
    make: Callable[[Any, str], Row],
    *,
    id_field: str | None = None,
    limit: int | None = None,
    meter: Meter | None = None,
) -> Iterator[Row | BadRow]:
    """`make(item, key)` of every item, or the reason why not; keys hold the row's number and id.

    An item that is a RowError is a reason already. A `meter` counts items, which must then be a
    list.
    """
    if meter is not None and isinstance(items, Sized):
        meter.expect(len(items))
    for number, item in enumerate(items):
        if limit is not None and number >= limit:
            return
        own = item.get(id_field) if id_field and isinstance(item, dict) else None
        key = f"{name}/{number:06d}" if own is None else f"{name}/{number:06d}/{own}"
        try:
            if isinstance(item, RowError):
                raise item
            yield make(item, key)
        except RowError as error:
            yield BadRow(key=key, reason=error.reason, detail=error.detail)
        if meter is not None:
            meter.add(1)
