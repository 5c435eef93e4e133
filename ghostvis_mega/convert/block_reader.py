"""Files that are read once, in blocks, with a CRC-32 of what was read.

Threads read the next blocks before they are asked for, and those that were used last are kept, for
tensors that are strips of one another. Reads go through the page cache: its read-ahead asks a disk
for more at a time than blocks of ours, and was up to twice as fast as direct reads.
"""

import contextlib
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np

from ghostvis_mega.utils.closing import Closing
from ghostvis_mega.utils.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""Read or written at a time; a multiple of what any disk wants direct writes to be aligned to."""
_KEPT = 24
"""Blocks in memory: the QKV matrix of a 7B model has nine, and several threads read."""
_AHEAD = 2
"""Blocks that are on their way behind the one that is used."""
_THREADS = 3
_POLYNOMIAL = 0xEDB88320
"""Of CRC-32, lowest bit first."""

Buffer = bytes | bytearray | memoryview


@dataclass(eq=False)
class OpenFile:
    """A file that is being read."""

    descriptor: int
    path: Path
    size_bytes: int
    reader: "BlockReader | None" = None
    """Through which it is read; None: as the page cache has it."""
    crcs: dict[int, int] = field(default_factory=dict)
    """CRC-32 of each block that `reader` has read."""

    def read_into(self, at: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `at` on.

        Raises:
            CheckpointError: The file ends before, or cannot be read.
        """
        if self.reader is not None:
            self.reader.read_into(self, at, into)
            return
        # The disk works on what comes next while this is hashed.
        os.posix_fadvise(self.descriptor, at + len(into), 4 * BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
        self.fill(at, into)

    def fill(self, at: int, into: memoryview) -> None:
        """Read what `into` has room for."""
        done = 0
        try:
            while done < len(into):
                found = os.preadv(self.descriptor, [into[done:]], at + done)
                if not found:
                    raise CheckpointError(f"{self.path} became shorter while it was read")
                done += found
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error

    def span(self, start: int, length: int) -> "Span":
        """Some of its bytes."""
        return Span(self, start, length)

    def crc32(self) -> int:
        """CRC-32 of the whole file; blocks that nobody has asked for yet are read."""
        assert self.reader is not None, "only blocks have a CRC-32"
        found = 0
        for number in range(-(-self.size_bytes // BLOCK_BYTES)):
            if number not in self.crcs:
                self.reader.read_into(self, number * BLOCK_BYTES, memoryview(bytearray(1)))
            length = min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES)
            found = crc32_joined(found, self.crcs[number], length)
        return found


@dataclass(frozen=True)
class Span:
    """Bytes of an open file, which are read where and when they are needed."""

    file: OpenFile
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read_into(self, at: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `at` on.

        Raises:
            CheckpointError: The file ends before, or cannot be read.
        """
        self.file.read_into(self.start + at, into)

    def chunks(self, size: int) -> Iterator[memoryview]:
        """The bytes, piece by piece; a piece is valid until the next."""
        buffer = memoryview(bytearray(min(size, self.length)))
        for at in range(0, self.length, size):
            piece = buffer[: min(size, self.length - at)]
            self.read_into(at, piece)
            yield piece


Piece = Buffer | Span


def loaded(pieces: Iterable[Piece], *, size: int) -> Iterator[Buffer]:
    """Pieces as bytes, each valid until the next; spans are read `size` bytes at a time."""
    for piece in pieces:
        if isinstance(piece, Span):
            yield from piece.chunks(size)
        else:
            yield piece


class _Block:
    """Memory of one block."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self.bytes = np.frombuffer(self.view, np.uint8)
        self.users = 0
        self.ready: Future[None] = Future()


class BlockReader(Closing):
    """Reads the blocks of some files for any number of threads.

    Close it before the files: reads may be under way.

    Args:
        crc: Take the CRC-32 of each block.
    """

    def __init__(self, *, crc: bool = False):
        self._crc = crc
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="blocks")
        self._lock = Lock()
        self._blocks: OrderedDict[tuple[OpenFile, int], _Block] = OrderedDict()
        """Those used last come last."""

    def read_into(self, file: OpenFile, at: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `at` on.

        Raises:
            CheckpointError: The file ends before, or cannot be read.
        """
        target, done = np.frombuffer(into, np.uint8), 0
        if at + len(into) > file.size_bytes:
            raise CheckpointError(f"{file.path} became shorter while it was read")
        while done < len(into):
            number, offset = divmod(at + done, BLOCK_BYTES)
            length = min(BLOCK_BYTES - offset, len(into) - done)
            with self._block(file, number) as block:
                # Unlike an assignment to a memoryview this lets other threads run.
                np.copyto(target[done : done + length], block.bytes[offset : offset + length])
            done += length

    @contextlib.contextmanager
    def _block(self, file: OpenFile, number: int) -> Iterator[_Block]:
        """A block with its content, which stays while it is used."""
        with self._lock:
            block = self._find(file, number)
            block.users += 1
            for ahead in range(number + 1, number + 1 + _AHEAD):
                if ahead * BLOCK_BYTES < file.size_bytes:
                    self._find(file, ahead)
        try:
            block.ready.result()
            yield block
        finally:
            with self._lock:
                block.users -= 1

    def _find(self, file: OpenFile, number: int) -> _Block:
        """A block that is here or on its way."""
        key = (file, number)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        block = self._blocks[key] = self._unused()
        block.ready = self._pool.submit(self._load, file, number, block)
        return block

    def _unused(self) -> _Block:
        """Memory for one more block; that of the one not used for longest, if there are many."""
        if len(self._blocks) >= _KEPT:
            for key, block in self._blocks.items():
                if not block.users and block.ready.done():
                    return self._blocks.pop(key)
        return _Block()

    def _load(self, file: OpenFile, number: int, block: _Block) -> None:
        begin = number * BLOCK_BYTES
        length = min(BLOCK_BYTES, file.size_bytes - begin)
        file.fill(begin, block.view[:length])
        if self._crc:
            crc = zlib.crc32(block.view[:length])
            if file.crcs.setdefault(number, crc) != crc:
                raise CheckpointError(f"{file.path} changed while it was read")

    def close(self) -> None:
        """Wait for reads that are under way and let go of the memory."""
        self._pool.shutdown(cancel_futures=True)
        self._blocks.clear()


def crc32_joined(first: int, second: int, length: int) -> int:
    """CRC-32 of two stretches of bytes, one behind the other.

    Args:
        first: Of the first stretch.
        second: Of the second.
        length: Bytes of the second.
    """
    bit = 0
    while length >> bit:
        if length >> bit & 1:
            first = _times(_zeros(bit), first)
        bit += 1
    return first ^ second


@cache
def _zeros(power: int) -> tuple[int, ...]:
    """What 2^power zero bytes behind the others do to a CRC-32: a matrix of bits, by columns."""
    if power:
        half = _zeros(power - 1)
        return tuple(_times(half, column) for column in half)
    found = []
    for bit in range(32):
        value = 1 << bit
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        found.append(value)
    return tuple(found)


def _times(matrix: tuple[int, ...], vector: int) -> int:
    found = 0
    for column in matrix:
        if vector & 1:
            found ^= column
        vector >>= 1
    return found
