"""Files written past the page cache are the same bytes, with the same digest, wherever they are."""

import errno
import fcntl
import hashlib
import os
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.convert.direct_file import BLOCK_BYTES, DirectFile, Span, crc32_file, loaded
from ghostvis_mega.utils.errors import CheckpointError

SIZES = (0, 1, 4095, BLOCK_BYTES - 1, BLOCK_BYTES, 5 * BLOCK_BYTES + 4097)


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("direct", [True, False])
def test_any_mix_of_pieces_becomes_the_file(tmp_path: Path, monkeypatch, direct: bool):
    if not direct:
        # As on a file system that has no direct writes.
        real = fcntl.fcntl

        def refusing(file: int, command: int, *more: int) -> int:
            if command == fcntl.F_SETFL:
                raise OSError(errno.EINVAL, "no direct writes here")
            return real(file, command, *more)

        monkeypatch.setattr(fcntl, "fcntl", refusing)
    source = tmp_path / "source"
    data = noise(SIZES[-1])
    source.write_bytes(data)
    descriptor = os.open(source, os.O_RDONLY)
    for size in SIZES:
        path = tmp_path / f"{size}"
        file = DirectFile(path, crc=size % 2 == 0)
        assert file._direct == direct
        third = size // 3
        file.write(data[:third])
        file.write(Span(descriptor, source, third, size - third))
        file.close()
        assert path.read_bytes() == data[:size], size
        assert file.sha256 == hashlib.sha256(data[:size]).hexdigest()
        assert file.size_bytes == size
        assert file.crc32 == (None if size % 2 else zlib.crc32(data[:size]))
        assert crc32_file(path) == zlib.crc32(data[:size])
    os.close(descriptor)


def test_a_file_is_never_replaced(tmp_path: Path):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"


def test_a_failed_write_of_a_thread_is_told(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = DirectFile(tmp_path / "new")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(8):
            file.write(bytes(BLOCK_BYTES))
    file.discard()


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    descriptor = os.open(path, os.O_RDONLY)
    span = Span(descriptor, path, 10, 90)
    assert b"".join(bytes(piece) for piece in loaded([span], size=17)) == bytes(90)
    os.truncate(path, 50)
    with pytest.raises(CheckpointError, match="short became shorter while it was read"):
        list(loaded([span], size=17))
    os.close(descriptor)


def test_neither_descriptors_nor_threads_are_left(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for number in range(5):
        file = DirectFile(tmp_path / f"{number}")
        file.write(bytes(2 * BLOCK_BYTES))
        file.close() if number % 2 else file.discard()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
