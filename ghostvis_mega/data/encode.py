"""What ingest does to a block of rows, here or in worker processes: check, tokenise, decode.

A block depends on its rows alone and blocks come back in order, so the number of workers changes
nothing but the time.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ghostvis_mega.data.manifest import TokenizerInfo
from ghostvis_mega.data.pixels import ImageError, ImageInfo, probe
from ghostvis_mega.data.template import ChatTemplate, Encoded, RowError, Turn
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import read_small

MAX_IMAGE_BYTES = 256 * 1024 * 1024
_BLOCKS_AHEAD = 3
"""Blocks in flight for each worker."""


@dataclass(frozen=True)
class Row:
    """One conversation of a source; images in the order of their places in the text.

    An image is a file, the encoded bytes themselves, or the number of one that is stored already.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[Path | bytes | int, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenRow:
    """A document that is tokens already, of the tokenizer that ingest is given.

    `tokens` is an integer array [n]; an end-of-text token in the last place is kept as such.
    """

    key: str
    tokens: np.ndarray


@dataclass(frozen=True)
class BadRow:
    """A row that its reader could not understand."""

    key: str
    reason: str
    detail: str


class Refusal(NamedTuple):
    """Why a row or an image is not taken."""

    reason: str
    detail: str


Picture = tuple[bytes, ImageInfo]


@dataclass(frozen=True)
class Block:
    """Rows with the numbers of their sources; `fresh` files are in no earlier block."""

    rows: tuple[tuple[int, Row | TokenRow | BadRow], ...]
    fresh: frozenset[Path]


@dataclass
class Result:
    """One entry a row, and the files that were read."""

    rows: list[list[Encoded] | Refusal] = field(default_factory=list)
    inline: list[tuple[ImageInfo | None, ...]] = field(default_factory=list)
    pictures: dict[Path, Picture | Refusal] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderSpec:
    """What a worker needs to make its encoder."""

    tokenizer: Path
    info: TokenizerInfo
    template: str
    max_tokens: int | None

    def build(self) -> "Encoder":
        """The encoder."""
        tokenizer = Tokenizer.load(self.tokenizer, info=self.info)
        return Encoder(ChatTemplate(tokenizer, self.template), max_tokens=self.max_tokens)


def read_picture(path: Path) -> Picture | Refusal:
    """Bytes and description of an image file, decoded once to be sure."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Refusal("too_large", f"{path.name}: more than {MAX_IMAGE_BYTES} bytes")
        data = read_small(path, limit=MAX_IMAGE_BYTES)
        return data, probe(data)
    except OSError as error:
        return Refusal("missing_image", f"{path.name}: {error.strerror}")
    except ImageError as error:
        return Refusal(error.reason, f"{path.name}: {error.detail}")


class Encoder:
    """Turns blocks into results."""

    def __init__(self, template: ChatTemplate, *, max_tokens: int | None):
        self._template = template
        self._max_tokens = max_tokens

    def run(self, block: Block) -> Result:
        """Check and encode every row; read the files that its good rows name first."""
        result = Result()
        for _, row in block.rows:
            encoded, infos = self._row(row, block.fresh, result.pictures)
            result.rows.append(encoded)
            result.inline.append(infos)
        return result

    def _row(
        self,
        row: Row | TokenRow | BadRow,
        fresh: frozenset[Path],
        pictures: dict[Path, Picture | Refusal],
    ) -> tuple[list[Encoded] | Refusal, tuple[ImageInfo | None, ...]]:
        if isinstance(row, BadRow):
            return Refusal(row.reason, row.detail), ()
        try:
            if isinstance(row, TokenRow):
                _check_text(row.key)
                return self._template.split_tokens(row.tokens, max_tokens=self._max_tokens), ()
            encoded = self._template.encode_split(
                row.turns, num_images=len(row.images), max_tokens=self._max_tokens
            )
            _check_text(row.key, *row.answers)
            infos = tuple(probe(i) if isinstance(i, bytes) else None for i in row.images)
        except (RowError, ImageError) as error:
            return Refusal(error.reason, error.detail), ()
        for image in row.images:
            if isinstance(image, Path) and image in fresh and image not in pictures:
                pictures[image] = read_picture(image)
        return encoded, infos


def _check_text(*texts: str) -> None:
    """Key and answers are stored as UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError("bad_text", f"key or answer: {error.reason}") from error


_worker: list[Encoder] = []
"""The encoder of this worker process."""


def _start_worker(spec: EncoderSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker.append(spec.build())


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A worker whose parent was killed would wait for rows for ever."""
    parent.join()
    os._exit(1)


def _run_in_worker(block: Block) -> Result:
    return _worker[0].run(block)


def encode_blocks(
    blocks: Iterable[Block], *, spec: EncoderSpec, workers: int
) -> Iterator[tuple[Block, Result]]:
    """Results in the order of the blocks; `workers` of 1 means this process.

    Raises:
        DataError: a worker died.
    """
    if workers == 1:
        encoder = spec.build()
        for block in blocks:
            yield block, encoder.run(block)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(spec,),
    )
    waiting: deque[tuple[Block, Future[Result]]] = deque()
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_run_in_worker, block)))
            if len(waiting) >= _BLOCKS_AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, perhaps for lack of memory: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
