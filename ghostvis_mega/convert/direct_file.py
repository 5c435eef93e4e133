"""New files whose blocks are read, hashed and written side by side, past the page cache.

A plain write copies every byte into the page cache, where gigabytes gather until `fsync` waits for
them. Here full blocks go straight to the disk while the next ones are read and hashed.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.utils.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""Written at a time; a multiple of what any disk wants direct writes to be aligned to."""
_BLOCKS = 4
"""Of one file in memory: being read, hashed, written, and one between."""
_AHEAD_BYTES = 4 * BLOCK_BYTES

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Span:
    """Bytes of an open file, which are read where and when they are needed."""

    file: int
    """Descriptor."""
    path: Path
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read_into(self, at: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `at` on.

        Raises:
            CheckpointError: The file ends before.
        """
        begin, done = self.start + at, 0
        # The disk works on what comes next while this is hashed.
        os.posix_fadvise(self.file, begin + len(into), _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        while done < len(into):
            found = os.preadv(self.file, [into[done:]], begin + done)
            if not found:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            done += found

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


def crc32_file(path: Path) -> int:
    """CRC-32 of a file's bytes.

    Raises:
        CheckpointError: It cannot be read.
    """
    found = 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for chunk in Span(file.fileno(), path, 0, size).chunks(BLOCK_BYTES):
                found = zlib.crc32(chunk, found)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return found


class _Block:
    """Memory that the disk may read from: pages of its own."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self.work: tuple[Future[None], ...] = ()

    def wait(self) -> None:
        """Until it is hashed and written."""
        work, self.work = self.work, ()
        for future in work:
            future.result()


class DirectFile:
    """A new file, written front to back, that knows its size and SHA-256 when it is closed.

    Args:
        path: Must not exist.
        crc: Take a CRC-32 as well.
    """

    def __init__(self, path: Path, *, crc: bool = False):
        self.crc32 = 0 if crc else None
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = self._set_direct(True)
        self._digest = hashlib.sha256()
        # One thread each: blocks are hashed in their order.
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._blocks = [_Block() for _ in range(_BLOCKS)]
        self._number = self._used = 0

    def _set_direct(self, wanted: bool) -> bool:
        """Turn direct writing on or off; False where the file system has none."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        direct = getattr(os, "O_DIRECT", 0)
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return wanted

    @property
    def size_bytes(self) -> int:
        """Of everything given so far."""
        return self._number * BLOCK_BYTES + self._used

    @property
    def sha256(self) -> str:
        """Hex digest of the closed file."""
        return self._digest.hexdigest()

    def write(self, piece: Piece) -> None:
        """Append; an error of an earlier write may come here."""
        at, length = 0, len(piece)
        while at < length:
            room = self._block.view[self._used : self._used + length - at]
            if isinstance(piece, Span):
                piece.read_into(at, room)
            else:
                room[:] = memoryview(piece)[at : at + len(room)]
            at += len(room)
            self._used += len(room)
            if self._used == BLOCK_BYTES:
                self._send()

    @property
    def _block(self) -> _Block:
        return self._blocks[self._number % _BLOCKS]

    def _send(self) -> None:
        """Hand a full block to the threads and wait until the next one is free."""
        block = self._block
        block.work = (
            self._hasher.submit(self._digest.update, block.view),
            self._writer.submit(self._put, block.view, self._number * BLOCK_BYTES),
        )
        self._number, self._used = self._number + 1, 0
        self._block.wait()

    def _put(self, data: memoryview, at: int) -> None:
        if self.crc32 is not None:
            self.crc32 = zlib.crc32(data, self.crc32)
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], at + done)

    def close(self) -> None:
        """Write what is left and wait for the disk."""
        for block in self._blocks:
            block.wait()
        tail = self._block.view[: self._used]
        self._digest.update(tail)
        if self._direct:
            # The end of a file is no whole number of the disk's blocks.
            self._set_direct(False)
        self._put(tail, self._number * BLOCK_BYTES)
        os.fsync(self._file)
        self._end()

    def discard(self) -> None:
        """Close without what is left, for files that are about to be deleted."""
        for block in self._blocks:
            # The error that led here is being told already.
            with contextlib.suppress(OSError):
                block.wait()
        self._end()

    def _end(self) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        os.close(self._file)
