"""From rows of any source to a prepared dataset: validate, encode, store, or note why not.

Every row ends up in the dataset or in rejects.jsonl. Rows are taken in the order of the reader, so
the result depends on the input alone, not on the number of workers.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from ghostvis_mega.data.encode import (
    BadRow,
    Block,
    EncoderSpec,
    Refusal,
    Result,
    Row,
    TokenRow,
    encode_blocks,
    read_picture,
)
from ghostvis_mega.data.manifest import Manifest, read_manifest
from ghostvis_mega.data.pixels import ImageInfo
from ghostvis_mega.data.template import TEMPLATE_NAME, Encoded
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.writer import DatasetWriter, content_hash
from ghostvis_mega.utils.errors import DataError

__all__ = [
    "BadRow",
    "DryRun",
    "Row",
    "Source",
    "TokenRow",
    "dry_run",
    "ingest",
    "make_spec",
    "store_rows",
]

log = logging.getLogger(__name__)

BLOCK_ROWS = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """A named stream of rows."""

    name: str
    rows: Iterable[Row | TokenRow | BadRow]
    license: str = ""


class Sink(Protocol):
    """Where rows go: a dataset, or a count."""

    reasons: Counter[str]

    def add_image(self, data: bytes, info: ImageInfo) -> int: ...

    def add_sample(
        self,
        encoded: Encoded,
        *,
        key: str,
        answers: tuple[str, ...],
        image_ids: list[int],
        source: int,
    ) -> None: ...

    def reject(self, *, key: str, source: int, reason: str, detail: str) -> None: ...

    def end_row(self) -> None: ...


@dataclass(frozen=True)
class DryRun:
    """What an ingest would do."""

    rows: int
    samples: int
    images: int
    tokens: int
    trained_tokens: int
    rejected: dict[str, int]


def ingest(
    sources: list[Source],
    *,
    tokenizer: Tokenizer,
    path: Path,
    template: str = TEMPLATE_NAME,
    force: bool = False,
    progress: Progress | None = None,
    workers: int = 1,
    max_tokens: int | None = None,
) -> Manifest:
    """Write all rows of `sources` to a new dataset at `path`.

    Args:
        template: chat template; the tokenizer was loaded with its specials.
        force: replace a dataset that is there.
        progress: called with (rows, rejected) after every block.
        workers: processes that decode and tokenise; 1 is this one.
        max_tokens: cut documents, not conversations, into samples of at most so many.

    Raises:
        DataError: `path` is taken, or an input cannot be read.
    """
    described = [{"name": source.name, "license": source.license} for source in sources]
    spec = make_spec(tokenizer, template, max_tokens)
    with DatasetWriter(
        path, tokenizer=tokenizer, template=template, sources=described, force=force
    ) as writer:
        store_rows(sources, writer, spec=spec, workers=workers, progress=progress)
    _warn(str(path), writer.reasons)
    return read_manifest(path)


def dry_run(
    sources: list[Source],
    *,
    tokenizer: Tokenizer,
    template: str = TEMPLATE_NAME,
    progress: Progress | None = None,
    workers: int = 1,
    max_tokens: int | None = None,
) -> DryRun:
    """Do all that `ingest` does but write."""
    sink = _Count()
    spec = make_spec(tokenizer, template, max_tokens)
    rows = store_rows(sources, sink, spec=spec, workers=workers, progress=progress)
    return DryRun(
        rows=rows,
        samples=sink.samples,
        images=len(sink.images),
        tokens=sink.tokens,
        trained_tokens=sink.trained_tokens,
        rejected=dict(sorted(sink.reasons.items())),
    )


def make_spec(tokenizer: Tokenizer, template: str, max_tokens: int | None) -> EncoderSpec:
    """What encoders need; DataError if no sample can be that short."""
    if max_tokens is not None and max_tokens < 2:
        raise DataError(f"max_tokens={max_tokens} is too small: a sample needs at least 2")
    info = tokenizer.info(file=tokenizer.file_name)
    return EncoderSpec(tokenizer.path, info, template, max_tokens)


def _warn(where: str, reasons: Counter[str]) -> None:
    for reason, times in sorted(reasons.items()):
        log.warning("%s: %d rows rejected: %s", where, times, reason)


class _Count:
    """Counts instead of writing."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.images: dict[bytes, int] = {}
        self.samples = self.tokens = self.trained_tokens = 0

    def add_image(self, data: bytes, info: ImageInfo) -> int:
        return self.images.setdefault(content_hash(data), len(self.images))

    def add_sample(
        self,
        encoded: Encoded,
        *,
        key: str,
        answers: tuple[str, ...],
        image_ids: list[int],
        source: int,
    ) -> None:
        self.samples += 1
        self.tokens += len(encoded.tokens)
        self.trained_tokens += int(encoded.trained_mask[1:].sum())

    def reject(self, *, key: str, source: int, reason: str, detail: str) -> None:
        self.reasons[reason] += 1

    def end_row(self) -> None:
        pass


def store_rows(
    sources: list[Source],
    sink: Sink,
    *,
    spec: EncoderSpec,
    workers: int,
    skip: int = 0,
    progress: Progress | None = None,
) -> int:
    """Store all rows but the first `skip`, which an interrupted run stored; returns all rows."""
    importer = _Importer(sink)
    rows = ((n, row) for n, source in enumerate(sources) for row in source.rows)
    blocks = importer.blocks(islice(rows, skip, None))
    count = skip
    for block, result in encode_blocks(blocks, spec=spec, workers=workers):
        importer.take(block, result)
        count += len(block.rows)
        if progress is not None:
            progress(count, sink.reasons.total())
    return count


class _Importer:
    """Stores rows in order; remembers files, since many rows ask about the same picture."""

    def __init__(self, sink: Sink):
        self._sink = sink
        self._asked: set[Path] = set()
        self._known: dict[Path, int | Refusal] = {}

    def blocks(self, rows: Iterator[tuple[int, Row | TokenRow | BadRow]]) -> Iterator[Block]:
        """Rows in blocks; each file is read in the block that names it first."""
        while block := tuple(islice(rows, BLOCK_ROWS)):
            named = {
                image
                for _, row in block
                if isinstance(row, Row)
                for image in row.images
                if isinstance(image, Path)
            }
            yield Block(block, frozenset(named - self._asked))
            self._asked |= named

    def take(self, block: Block, result: Result) -> None:
        """Store the rows of a block or write them to the ledger."""
        for (source, row), encoded, infos in zip(
            block.rows, result.rows, result.inline, strict=True
        ):
            stored: list[int] | Refusal = []
            if isinstance(encoded, Refusal):
                stored = encoded
            elif isinstance(row, Row):
                stored = self._store_images(row, infos, result)
            if isinstance(stored, Refusal):
                self._sink.reject(
                    key=row.key, source=source, reason=stored.reason, detail=stored.detail
                )
            else:
                answers = row.answers if isinstance(row, Row) else ()
                self._add(row.key, answers, encoded, stored, source)
            self._sink.end_row()

    def _add(
        self,
        key: str,
        answers: tuple[str, ...],
        parts: list[Encoded],
        image_ids: list[int],
        source: int,
    ) -> None:
        for number, part in enumerate(parts):
            self._sink.add_sample(
                part,
                key=key if len(parts) == 1 else f"{key}#{number}",
                answers=answers,
                image_ids=image_ids,
                source=source,
            )

    def _store_images(
        self, row: Row, infos: tuple[ImageInfo | None, ...], result: Result
    ) -> list[int] | Refusal:
        """Ids of all images of a row; nothing is stored unless all of them are good."""
        fresh: dict[Path, tuple[bytes, ImageInfo]] = {}
        for image in row.images:
            if not isinstance(image, Path) or image in fresh:
                continue
            known = self._known.get(image)
            if known is None:
                # Not in the result: an earlier row named the file but was refused for its text.
                known = result.pictures.get(image) or read_picture(image)
                if not isinstance(known, Refusal):
                    fresh[image] = known
                    continue
                self._known[image] = known
            if isinstance(known, Refusal):
                return known
        image_ids = []
        for image, info in zip(row.images, infos, strict=True):
            if isinstance(image, int):
                image_ids.append(image)
            elif isinstance(image, bytes):
                assert info is not None, "encoders describe the pictures that rows bring"
                image_ids.append(self._sink.add_image(image, info))
            else:
                if image in fresh and image not in self._known:
                    self._known[image] = self._sink.add_image(*fresh[image])
                image_ids.append(self._known[image])
        return image_ids
