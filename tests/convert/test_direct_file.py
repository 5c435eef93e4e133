"""Files written past the page cache or read in blocks are the same bytes, with the same digest,
wherever they are."""

import errno
import fcntl
import hashlib
import os
import random
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.convert import block_reader
from ghostvis_mega.convert.block_reader import (
    BLOCK_BYTES,
    BlockReader,
    OpenFile,
    crc32_joined,
    loaded,
)
from ghostvis_mega.convert.direct_file import DirectFile
from ghostvis_mega.utils.errors import CheckpointError

SIZES = (0, 1, 4095, BLOCK_BYTES - 1, BLOCK_BYTES, 5 * BLOCK_BYTES + 4097)


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@contextmanager
def opened(path: Path, reader: BlockReader | None = None) -> Iterator[OpenFile]:
    descriptor = os.open(path, os.O_RDONLY)
    yield OpenFile(descriptor, path, path.stat().st_size, reader)
    if reader is not None:
        reader.close()
    os.close(descriptor)


@pytest.fixture(params=["direct", "no direct access"])
def direct(request, monkeypatch) -> bool:
    if request.param == "direct":
        return True
    real = fcntl.fcntl

    def refusing(file: int, command: int, *more: int) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "as some file systems say")
        return real(file, command, *more)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    return False


def test_any_mix_of_pieces_becomes_the_file(tmp_path: Path, direct: bool):
    source = tmp_path / "source"
    data = noise(SIZES[-1])
    source.write_bytes(data)
    with opened(source) as plain, opened(source, BlockReader()) as blocks:
        for size in SIZES:
            path = tmp_path / f"{size}"
            file = DirectFile(path, crc=size % 2 == 0)
            assert file._direct == direct
            third = size // 3
            file.write(data[:third])
            file.write(plain.span(third, third))
            file.write(blocks.span(2 * third, size - 2 * third))
            file.close()
            assert path.read_bytes() == data[:size], size
            assert file.sha256 == hashlib.sha256(data[:size]).hexdigest()
            assert file.size_bytes == size
            assert file.crc32 == (None if size % 2 else zlib.crc32(data[:size]))


@pytest.mark.parametrize("size", SIZES)
def test_a_crc_counts_what_was_read_and_reads_the_rest(tmp_path: Path, monkeypatch, size: int):
    monkeypatch.setattr(block_reader, "_AHEAD", 0)
    path, data = tmp_path / "file", noise(size)
    path.write_bytes(data)
    with opened(path, BlockReader(crc=True)) as file:
        into = bytearray(size // 2)
        file.read_into(size // 3, memoryview(into))
        assert bytes(into) == data[size // 3 : size // 3 + size // 2]
        # Blocks that were handed out count as they were, not as they are on the disk now.
        path.write_bytes(bytes(size))
        expected = bytearray(size)
        for number in file.crcs:
            block = slice(number * BLOCK_BYTES, min(size, (number + 1) * BLOCK_BYTES))
            expected[block] = data[block]
        assert file.crcs or size < 2
        assert file.crc32() == zlib.crc32(expected)


def test_threads_that_read_more_than_is_kept_get_their_bytes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(block_reader, "_KEPT", 3)
    path, data = tmp_path / "file", noise(SIZES[-1])
    path.write_bytes(data)
    with opened(path, BlockReader(crc=True)) as file:

        def read(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                start = chance.randrange(len(data))
                into = bytearray(min(chance.randrange(2 * BLOCK_BYTES), len(data) - start))
                file.read_into(start, memoryview(into))
                assert into == data[start : start + len(into)]

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
        assert file.reader is not None and len(file.reader._blocks) < 16
        assert file.crc32() == zlib.crc32(data)


def test_a_file_that_is_changed_between_two_reads_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(block_reader, "_KEPT", 1)
    monkeypatch.setattr(block_reader, "_AHEAD", 0)
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * BLOCK_BYTES))
    with opened(path, BlockReader(crc=True)) as file:
        for number in range(3):
            file.read_into(number * BLOCK_BYTES, memoryview(bytearray(9)))
        path.write_bytes(b"x" * (3 * BLOCK_BYTES))
        with pytest.raises(CheckpointError, match="file changed while it was read"):
            file.read_into(0, memoryview(bytearray(9)))


def test_joined_crcs_are_those_of_the_whole():
    chance = random.Random(0)
    for _ in range(50):
        data = chance.randbytes(chance.randrange(3000))
        cut = chance.randrange(len(data) + 1)
        one, other = data[:cut], data[cut:]
        assert crc32_joined(zlib.crc32(one), zlib.crc32(other), len(other)) == zlib.crc32(data)
    zeros = bytes(BLOCK_BYTES)
    found = crc32_joined(zlib.crc32(b"abc"), zlib.crc32(zeros), len(zeros))
    assert found == zlib.crc32(zeros, zlib.crc32(b"abc"))


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


@pytest.mark.parametrize("blocks", [False, True])
def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path, blocks: bool):
    path = tmp_path / "short"
    path.write_bytes(bytes(5 * BLOCK_BYTES))
    with opened(path, BlockReader() if blocks else None) as file:
        span = file.span(10, 90)
        assert b"".join(bytes(piece) for piece in loaded([span], size=17)) == bytes(90)
        os.truncate(path, 50)
        with pytest.raises(CheckpointError, match="short became shorter while it was read"):
            list(loaded([file.span(5 * BLOCK_BYTES - 90, 90)], size=17))
        with pytest.raises(CheckpointError, match="short became shorter while it was read"):
            list(loaded([file.span(5 * BLOCK_BYTES, 1)], size=17))


def test_neither_descriptors_nor_threads_are_left(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for number in range(5):
        file = DirectFile(tmp_path / f"{number}")
        file.write(bytes(2 * BLOCK_BYTES + 1))
        file.close() if number % 2 else file.discard()
        with opened(tmp_path / f"{number}", BlockReader()) as source:
            source.read_into(0, memoryview(bytearray(1)))
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
