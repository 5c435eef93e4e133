"""From rows of any source to a prepared dataset: validate, encode, store, or note why not.

Every row ends up in the dataset or in rejects.jsonl. Rows are taken in the order of the reader, so
the result depends on the input alone.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.data.manifest import Manifest, read_manifest
from ghostvis_mega.data.pixels import ImageError, ImageInfo, probe
from ghostvis_mega.data.template import (
    TEMPLATE_NAME,
    ChatTemplate,
    RowError,
    Turn,
    check_conversation,
)
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.writer import DatasetWriter

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 256 * 1024 * 1024
PROGRESS_EVERY = 10_000


@dataclass(frozen=True)
class Row:
    """One conversation of a source; images are files, in the order of their places in the text."""

    key: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that its reader could not understand."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Source:
    """A named stream of rows."""

    name: str
    rows: Iterable[Row | BadRow]
    license: str = ""


def ingest(
    sources: list[Source],
    *,
    tokenizer: Tokenizer,
    path: Path,
    template: str = TEMPLATE_NAME,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write all rows of `sources` to a new dataset at `path`.

    Args:
        force: replace a dataset that is there.
        progress: called with (rows, rejected) now and then.

    Raises:
        DataError: `path` is taken.
    """
    described = [{"name": source.name, "license": source.license} for source in sources]
    style = ChatTemplate(tokenizer, template)
    with DatasetWriter(
        path, tokenizer=tokenizer, template=template, sources=described, force=force
    ) as writer:
        importer = _Importer(writer, style)
        count = 0
        for number, source in enumerate(sources):
            for row in source.rows:
                importer.take(row, number)
                count += 1
                if progress is not None and count % PROGRESS_EVERY == 0:
                    progress(count, writer.reasons.total())
    for reason, times in sorted(writer.reasons.items()):
        log.warning("%s: %d rows rejected: %s", path, times, reason)
    return read_manifest(path)


class _Importer:
    """Stores rows one by one; remembers files, since many rows ask about the same picture."""

    def __init__(self, writer: DatasetWriter, template: ChatTemplate):
        self._writer = writer
        self._template = template
        self._known: dict[Path, int | ImageError] = {}

    def take(self, row: Row | BadRow, source: int) -> None:
        """Store `row` or write it to the ledger."""
        if isinstance(row, BadRow):
            self._writer.reject(key=row.key, source=source, reason=row.reason, detail=row.detail)
            return
        try:
            check_conversation(row.turns, num_images=len(row.images))
            encoded = self._template.encode(row.turns, num_images=len(row.images))
            _check_text(row)
            image_ids = self._store_images(row.images)
        except (RowError, ImageError) as error:
            self._writer.reject(
                key=row.key, source=source, reason=error.reason, detail=error.detail
            )
            return
        self._writer.add_sample(
            encoded, key=row.key, answers=row.answers, image_ids=image_ids, source=source
        )

    def _store_images(self, paths: tuple[Path, ...]) -> list[int]:
        """Ids of all images of a row; nothing is stored unless all of them are good."""
        fresh: dict[Path, tuple[bytes, ImageInfo]] = {}
        for path in paths:
            known = self._known.get(path)
            if isinstance(known, ImageError):
                raise ImageError(known.reason, known.detail)
            if known is None and path not in fresh:
                try:
                    data = _read_image(path)
                    fresh[path] = (data, probe(data))
                except ImageError as error:
                    self._known[path] = ImageError(error.reason, f"{path.name}: {error.detail}")
                    raise self._known[path] from error
        for path, (data, info) in fresh.items():
            self._known[path] = self._writer.add_image(data, info)
        return [self._known[path] for path in paths]


def _read_image(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise ImageError(
                "too_large", f"{path.stat().st_size} bytes, at most {MAX_IMAGE_BYTES} are read"
            )
        return path.read_bytes()
    except OSError as error:
        raise ImageError("missing_image", str(error.strerror)) from error


def _check_text(row: Row) -> None:
    """Key and answers are stored as UTF-8."""
    for text in (row.key, *row.answers):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError("bad_text", f"key or answer: {error.reason}") from error
