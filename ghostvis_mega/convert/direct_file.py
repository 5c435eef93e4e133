"""New files whose blocks are read, hashed and written side by side, past the page cache.

A plain write copies every byte into the page cache, where gigabytes gather until `fsync` waits for
them, at half the speed. Here full blocks go straight to the disk while the next ones are read and
hashed.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ghostvis_mega.convert.block_reader import BLOCK_BYTES, Piece, Span

_BLOCKS = 4
"""Of one file in memory: being read, hashed, written, and one between."""


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Turn direct access on or off; False where it is off, or the file system has none."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return wanted


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
        self._direct = _set_direct(self._file, True)
        self._digest = hashlib.sha256()
        # One thread each: blocks are hashed in their order.
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._blocks = [_Block() for _ in range(_BLOCKS)]
        self._number = self._used = 0

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
            _set_direct(self._file, False)
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
