"""Safetensors files as bytes: read through a memory map without keeping pages, written front to
back.

The files are those of the `safetensors` library. Its own calls hold whole tensors; here a tensor
passes by in chunks, so that memory does not grow with the model.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import HashingFile

CHUNK_BYTES = 16 << 20
_LARGEST_HEADER = 100_000_000
Buffer = bytes | bytearray | memoryview

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
"""Codes of the file format that weights may have."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a tensor."""

    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.item_bytes


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it names {key} twice")
        found[key] = value
    return found


class TensorFile:
    """An open safetensors file.

    Raises:
        CheckpointError: It is missing, cut short, or breaks the format; names the tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        self.others: set[str] = set()
        """Tensors of types that no weight has, such as buffers of integers."""
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        try:
            self.tensors, self._begin = self._read_header()
        except ValueError as error:
            raise CheckpointError(f"{path} is no sound safetensors file: {error}") from error

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        total = len(self._map)
        length = int.from_bytes(self._map[:8], "little")
        if total < 8 or length > min(_LARGEST_HEADER, total - 8):
            raise ValueError(f"its header would have {length} bytes, the file has {total}")
        header = json.loads(self._map[8 : 8 + length], object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
        header.pop("__metadata__", None)
        tensors, begins, ends = {}, {}, []
        for name, entry in header.items():
            try:
                dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
                begin, end = (int(n) for n in entry["data_offsets"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"the entry of {name} is broken ({error})") from error
            if dtype not in DTYPES:
                self.others.add(name)
                continue
            info = TensorInfo(dtype, shape)
            if begin < 0 or end - begin != info.num_bytes or 8 + length + end > total:
                raise ValueError(
                    f"{name} should be bytes {begin} to {end} of its data, which the file of "
                    f"{total} bytes or the shape {list(shape)} does not allow; it may be cut short"
                )
            tensors[name], begins[name] = info, 8 + length + begin
            ends.append((begin, end, name))
        for (_, end, _), (begin, _, name) in zip(sorted(ends), sorted(ends)[1:], strict=False):
            if begin < end:
                raise ValueError(f"{name} overlaps another tensor")
        return tensors, begins

    def chunks(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of a tensor, piece by piece; a piece is valid until the next."""
        base = self._begin[name]
        for at in range(base + start, base + stop, CHUNK_BYTES):
            end = min(at + CHUNK_BYTES, base + stop)
            with memoryview(self._map)[at:end] as piece:
                yield piece
            # Else the pages of a whole model would count as this process's memory.
            first = at // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of one tensor; for small ones."""
        info = self.tensors[name]
        data = joined(self.chunks(name, 0, info.num_bytes))
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)

    def close(self) -> None:
        """Let go of the file."""
        # A stream that an error broke off still looks into the map, which then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()


class TensorFileWriter:
    """A new safetensors file whose tensors arrive in the order of its header.

    Args:
        path: Must not exist.
        tensors: (name, type and shape), in order.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, TensorInfo]]):
        self._left = [(name, info.num_bytes) for name, info in reversed(tensors)]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in tensors:
            begin, end = end, end + info.num_bytes
            assert begin % info.item_bytes == 0, f"{name} would not be aligned"
            header[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.path = path
        self._file = HashingFile(path)
        self._pool = ThreadPoolExecutor(1)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, chunks: Iterator[Buffer]) -> None:
        """Append the next tensor.

        Raises:
            CheckpointError: It is not the one that is due, or has another size.
        """
        due, size = self._left.pop()
        assert due == name, f"{name} came where {due} is due"
        for chunk in chunks:
            self._file.write_beside(chunk, self._pool)
            size -= len(chunk)
        if size:
            raise CheckpointError(f"{self.path}: {name} came with {-size:+d} bytes too many or few")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if error is None:
            assert not self._left, f"{self._left[-1][0]} never came"
            self._file.close()
        else:
            self._file.discard()

    def entry(self) -> dict[str, object]:
        """Size and SHA-256 of the finished file."""
        return {"bytes": self._file.size_bytes, "sha256": self._file.sha256}


def cast(chunks: Iterator[Buffer], *, source: str, target: str) -> Iterator[Buffer]:
    """The same elements as another type, rounded to the nearest; chunks hold whole elements."""
    if source == target:
        yield from chunks
        return
    for chunk in chunks:
        values = torch.frombuffer(bytearray(chunk), dtype=DTYPES[source])
        yield as_bytes(values.to(DTYPES[target]))


def joined(chunks: Iterator[Buffer]) -> bytearray:
    """A copy of all chunks, each of which is valid only until the next."""
    found = bytearray()
    for chunk in chunks:
        found += chunk
    return found


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def shards_of(
    tensors: Mapping[str, TensorInfo], *, largest: int
) -> list[list[tuple[str, TensorInfo]]]:
    """Consecutive tensors of at most `largest` bytes together (more, where one alone is larger).

    A tensor that would not be aligned to its elements begins a new shard, which keeps the order.
    """
    shards: list[list[tuple[str, TensorInfo]]] = []
    size = 0
    for name, info in tensors.items():
        fits = size + info.num_bytes <= largest and size % info.item_bytes == 0
        if not shards or not fits:
            shards.append([])
            size = 0
        shards[-1].append((name, info))
        size += info.num_bytes
    return shards


def free_bytes(path: Path) -> int:
    """Free space where `path` is, or will be."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
