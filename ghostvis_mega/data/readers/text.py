"""Chats and documents without pictures, and pictures listed in a CSV file."""

import csv
import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ghostvis_mega.data.ingest import BadRow, Row
from ghostvis_mega.data.readers.common import (
    check_folder,
    image_path,
    json_items,
    list_field,
    make_rows,
    parquet_rows,
    text_field,
    visual_question,
)
from ghostvis_mega.data.readers.meter import Meter, size_of
from ghostvis_mega.data.readers.vqa import CAPTION_PROMPT
from ghostvis_mega.data.template import DOCUMENT, RowError, Turn
from ghostvis_mega.utils.errors import DataError

log = logging.getLogger(__name__)

_TABLE_ENDINGS = (".parquet", ".jsonl", ".json")
_TEXT_ENDINGS = (".txt", ".md")
_IMAGE_COLUMNS = ("image", "file_name", "filepath")
_MAX_CELL_CHARS = 1 << 24
_CAPTION_COLUMNS = ("caption", "text", "title")


def _items(
    path: Path, column: str, optional: tuple[str, ...], meter: Meter | None
) -> Iterator[Any]:
    """Rows of parquet, JSON or JSON lines; a broken line is a RowError."""
    if path.suffix.lower() == ".parquet":
        yield from parquet_rows(path, (column,), optional, meter)
    else:
        yield from json_items(path, meter)


def _tables(
    path: Path, column: str, make: Callable[[Any, str], Row], limit: int | None, meter: Meter
) -> Iterator[Row | BadRow]:
    """Rows of a file, or of all files of rows below a folder; keys then hold the file's name."""
    if not path.is_dir():
        items = _items(path, column, ("id",), meter)
        yield from make_rows(path.stem, items, make, id_field="id", limit=limit)
        return
    yield from _folder(path, _files_of_rows(path), column, make, limit, meter)


def _folder(
    path: Path,
    files: list[Path],
    column: str,
    make: Callable[[Any, str], Row],
    limit: int | None,
    meter: Meter,
) -> Iterator[Row | BadRow]:
    meter.expect(sum(size_of(file) for file in files))

    def rows() -> Iterator[Row | BadRow]:
        for file in files:
            name = f"{path.stem}/{file.relative_to(path).as_posix()}"
            items = _items(file, column, ("id",), None)
            yield from make_rows(name, items, make, id_field="id")
            meter.add(size_of(file))

    yield from islice(rows(), limit)


def _files_of_rows(folder: Path) -> list[Path]:
    """Parquet, JSON lines and JSON lists below a folder by name; other JSON is passed over."""
    found = []
    for file in sorted(folder.rglob("*")):
        ending = file.suffix.lower()
        if ending not in _TABLE_ENDINGS or not file.is_file():
            continue
        if ending == ".json" and not _is_list(file):
            log.warning("%s is no list of rows and is passed over", file)
            continue
        found.append(file)
    return found


def _is_list(file: Path) -> bool:
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as text:
        return text.read(4096).lstrip().startswith("[")


def _chat_row(row: Any, key: str) -> Row:
    turns = tuple(
        Turn(text_field(message, "role"), (text_field(message, "content"),))
        for message in list_field(row, "messages")
    )
    return Row(key=key, turns=turns)


def _document_row(row: Any, key: str) -> Row:
    return Row(key=key, turns=(Turn(DOCUMENT, (text_field(row, "text"),)),))


def chat_rows(
    path: Path, *, limit: int | None = None, meter: Meter | None = None
) -> Iterator[Row | BadRow]:
    """SmolTalk's layout: `messages`, a list of {role, content}; parquet, JSON or JSON lines.

    Of a folder, all such files below it, ordered by name.
    """
    yield from _tables(path, "messages", _chat_row, limit, meter or Meter())


def text_rows(
    path: Path, *, limit: int | None = None, meter: Meter | None = None
) -> Iterator[Row | BadRow]:
    """Documents: FineWeb's layout (a column `text`; parquet, JSON or JSON lines), or text files.

    A text file is a document; of a folder, all .txt and .md files below it are, ordered by name,
    and then come the rows of its other files.
    """
    meter = meter or Meter()
    if not path.is_dir() and path.suffix.lower() not in _TEXT_ENDINGS:
        yield from _tables(path, "text", _document_row, limit, meter)
        return
    files, tables = list(_text_files(path)), _files_of_rows(path) if path.is_dir() else []
    # Files and bytes do not add up: with both, the bytes of the tables are the measure.
    first = None if tables else meter
    yield from make_rows(path.stem, files, _text_file_row(path), limit=limit, meter=first)
    left = None if limit is None else max(0, limit - len(files))
    if tables:
        yield from _folder(path, tables, "text", _document_row, left, meter)


def _text_files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if not path.is_dir():
        yield path
        return
    found = (file for file in path.rglob("*") if file.suffix.lower() in _TEXT_ENDINGS)
    yield from sorted(file for file in found if file.is_file())


def _text_file_row(folder: Path) -> Any:
    def make(file: Path, key: str) -> Row:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RowError("bad_text", f"{file.name}: {error}") from error
        name = file.relative_to(folder).as_posix() if folder.is_dir() else file.name
        return Row(key=f"{key}/{name}", turns=(Turn(DOCUMENT, (text,)),))

    return make


def csv_rows(
    path: Path,
    *,
    images: Path | None,
    limit: int | None = None,
    prompt: str = CAPTION_PROMPT,
    meter: Meter | None = None,
) -> Iterator[Row | BadRow]:
    """An image folder and a CSV file with a header line.

    Columns: `image` (or file_name, filepath), and either `question` and `answer`, or `caption` (or
    text, title). The folder is the CSV file's own if none is given.
    """
    check_folder(images)
    folder = path.parent if images is None else images
    meter = meter or Meter()
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL_CHARS))
    try:
        size = path.stat().st_size
        meter.expect(size)
        with (
            open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
            meter.reading(file, size),
        ):
            table = _table(file)
            columns = next(table, [])
            if isinstance(columns, RowError):
                raise DataError(f"{path} is not a CSV file: {columns.detail}")
            make = _picture_row(path, columns, folder, prompt)
            yield from make_rows(path.stem, table, make, limit=limit)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _picture_row(
    path: Path, columns: list[str], folder: Path, prompt: str
) -> Callable[[Any, str], Row]:
    """What makes a row of the cells under `columns`; DataError if they name no picture or text."""
    picture = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    caption = next((name for name in _CAPTION_COLUMNS if name in columns), None)
    asked = {"question", "answer"} <= set(columns)
    if picture is None or not (asked or caption):
        raise DataError(
            f"{path} needs a header line with `image`, and `caption` or `question` and "
            f"`answer`; it has {', '.join(columns) or 'none'}"
        )

    def make(cells: list[str], key: str) -> Row:
        if len(cells) != len(columns):
            raise RowError("bad_row", f"the row has {len(cells)} cells, not {len(columns)}")
        row = dict(zip(columns, cells, strict=True))
        question = row["question"] if asked else prompt
        answer = row["answer"] if asked else row[str(caption)]
        return Row(
            key=key,
            turns=visual_question(question, answer),
            images=(image_path(row[picture], folder),),
            answers=(answer,),
        )

    return make


class _Lines:
    """Lines of a file that can be given back, to be read again."""

    def __init__(self, file: TextIO):
        self._file, self._again, self.count = file, deque[str](), 0
        self.taken: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.taken.append(line)
        self.count += 1
        return line

    def give_back(self) -> None:
        """All that was taken but the first line."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.count -= len(self.taken) - 1


def _table(file: TextIO) -> Iterator[list[str] | RowError]:
    """Rows of cells that are not empty; a row that is no CSV is a RowError.

    A quote that is never closed takes all lines up to the next quote: only the first of them is
    given up, the others are read again as rows.
    """
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True)
    while True:
        lines.taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back()
            yield RowError("bad_csv", f"line {lines.count}: {error}; read on after this line")
            continue
        if cells:
            yield cells
