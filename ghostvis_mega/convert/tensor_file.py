"""Safetensors files as bytes: read by spans, written front to back.

The files are those of the `safetensors` library. Its own calls hold whole tensors; here a tensor
passes by in chunks, so that memory does not grow with the model.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch

from ghostvis_mega.convert.block_reader import (
    BlockReader,
    OpenFile,
    Piece,
    Span,
    loaded,
)
from ghostvis_mega.convert.direct_file import DirectFile
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import open_regular

CHUNK_BYTES = 16 << 20
_LARGEST_HEADER = 100_000_000

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

    Args:
        path: Of the file.
        reader: Through which its tensors are read; None: plain reads.

    Raises:
        CheckpointError: It is missing, cut short, or breaks the format; names the tensor.
    """

    def __init__(self, path: Path, *, reader: BlockReader | None = None):
        self.path = path
        self.others: set[str] = set()
        """Tensors of types that no weight has, such as buffers of integers."""
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        try:
            self.tensors, self._begin = self._read_header()
        except (OSError, ValueError, RecursionError) as error:
            self.close()
            raise CheckpointError(f"{path} is no sound safetensors file: {error}") from error
        # Twice the read-ahead.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        size = os.fstat(self._descriptor).st_size
        self._file = OpenFile(self._descriptor, path, size, reader)

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        total = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if total < 8 or length > min(_LARGEST_HEADER, total - 8):
            raise ValueError(f"its header would have {length} bytes, the file has {total}")
        text = os.pread(self._descriptor, length, 8)
        header = json.loads(text, object_pairs_hook=_unique_keys)
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

    def span(self, name: str, start: int, stop: int) -> Span:
        """Bytes `start` to `stop` of a tensor."""
        return Span(self._file, self._begin[name] + start, stop - start)

    def crc32(self) -> int:
        """CRC-32 of the file, of which blocks that were read already are not read again."""
        return self._file.crc32()

    def chunks(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """The same, piece by piece; a piece is valid until the next."""
        return self.span(name, start, stop).chunks(CHUNK_BYTES)

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of one tensor; for small ones."""
        info = self.tensors[name]
        data = joined(self.chunks(name, 0, info.num_bytes))
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


class TensorFileWriter:
    """A new safetensors file whose tensors arrive in the order of its header.

    Args:
        path: Must not exist.
        tensors: (name, type and shape), in order.
        crc: Take a CRC-32 as well.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, TensorInfo]], *, crc: bool = False):
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
        self._file = DirectFile(path, crc=crc)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, pieces: Iterator[Piece]) -> None:
        """Append the next tensor.

        Raises:
            CheckpointError: It is not the one that is due, or has another size.
        """
        due, size = self._left.pop()
        assert due == name, f"{name} came where {due} is due"
        for piece in pieces:
            self._file.write(piece)
            size -= len(piece)
        if size:
            raise CheckpointError(f"{self.path}: {name} came with {-size:+d} bytes too many or few")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            assert not self._left, f"{self._left[-1][0]} never came"
            self._file.close()
        else:
            self._file.discard()

    def entry(self) -> dict[str, object]:
        """Size and digests of the finished file."""
        found: dict[str, object] = {"bytes": self._file.size_bytes, "sha256": self._file.sha256}
        return found if self._file.crc32 is None else found | {"crc32": self._file.crc32}


def cast(pieces: Iterator[Piece], *, source: str, target: str) -> Iterator[Piece]:
    """The same elements as another type, rounded to the nearest; pieces hold whole elements."""
    if source == target:
        yield from pieces
        return
    for chunk in loaded(pieces, size=CHUNK_BYTES):
        values = torch.frombuffer(bytearray(chunk), dtype=DTYPES[source])
        yield as_bytes(values.to(DTYPES[target]))


def joined(pieces: Iterable[Piece]) -> bytearray:
    """The bytes of all pieces, copied."""
    found = bytearray()
    for chunk in loaded(pieces, size=CHUNK_BYTES):
        found += chunk
    return found


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def shards_of(
    tensors: Mapping[str, TensorInfo], *, largest: int
) -> list[list[tuple[str, TensorInfo]]]:
    """Consecutive tensors of at most `largest` bytes together (more, where one alone is larger).

    Shards are as few as possible and then as equal as possible: each is written by a thread, and
    the largest is what the others wait for. A tensor that would not be aligned to its elements
    begins a new shard, which keeps the order.
    """
    shards = _filled(tensors, largest=largest)
    low, high = 0, largest
    while high - low > 1:
        middle = (low + high) // 2
        tried = _filled(tensors, largest=middle)
        if len(tried) > len(shards):
            low = middle
        else:
            high, shards = middle, tried
    return shards


def _filled(
    tensors: Mapping[str, TensorInfo], *, largest: int
) -> list[list[tuple[str, TensorInfo]]]:
    """Each shard as full as it gets."""
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
