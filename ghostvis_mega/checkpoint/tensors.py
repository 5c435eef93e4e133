"""Writes safetensors files front to back, without a second pass over the disk for their SHA-256.

The file format is that of the `safetensors` library, which reads these files; its own writer wants
all tensors in host memory at once. `write_tensors` holds one at a time; a `FileImage` is a whole
file in host memory, copied there quickly and written later.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ghostvis_mega.utils.files import HashingFile, unnoticed

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_PIECE_BYTES = 32 << 20
_BUFFER_BYTES = 1 << 20
_SYNC_BYTES = 256 << 20
"""Brought to the disk at once. The system takes whole files into its memory within seconds; only
what it has brought to the disk tells how far it is."""


class FileImage:
    """What a file of these tensors will hold, byte by byte; the tensors are looked at later.

    Args:
        tensors: (key, contiguous tensor on any device).
        metadata: Texts for the file's header.
    """

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]], *, metadata: Mapping[str, str]):
        self.head, self.tensors = _header(tensors, metadata)
        held = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
        self.size_bytes = len(self.head) + held

    def copy_to(self, buffer_B: torch.Tensor) -> None:
        """Put the whole file into host memory (uint8, `size_bytes` long); copies from a device may
        still be under way at the end."""
        at = len(self.head)
        buffer_B[:at] = torch.frombuffer(bytearray(self.head), dtype=torch.uint8)
        for tensor in self.tensors:
            num_bytes = tensor.numel() * tensor.element_size()
            place = buffer_B[at : at + num_bytes].view(tensor.dtype)
            place.copy_(tensor.detach().view(-1), non_blocking=True)
            at += num_bytes


def write_buffer(
    path: Path, buffer_B: torch.Tensor, *, moved: Callable[[int], None] = unnoticed
) -> None:
    """Write host memory to a new file and wait until it is on the disk.

    Args:
        path: The file.
        buffer_B: Its content, uint8.
        moved: Told of bytes when they are on the disk.
    """
    view = memoryview(buffer_B.numpy())
    with (
        open(path, "xb", buffering=_BUFFER_BYTES) as file,
        ThreadPoolExecutor(1, thread_name_prefix="fsync") as pool,
    ):
        syncing: Future[None] | None = None
        for begin in range(0, len(view), _SYNC_BYTES):
            part = view[begin : begin + _SYNC_BYTES]
            for at in range(0, len(part), _PIECE_BYTES):
                file.write(part[at : at + _PIECE_BYTES])
            file.flush()
            if syncing is not None:
                syncing.result()
                moved(_SYNC_BYTES)
            if begin + len(part) < len(view):
                # The next part goes to the system's memory meanwhile.
                syncing = pool.submit(os.fsync, file.fileno())
            else:
                os.fsync(file.fileno())
                moved(len(part))


def differs(
    path: Path, buffer_B: torch.Tensor, *, moved: Callable[[int], None] = unnoticed
) -> bool:
    """Whether a file holds other bytes than host memory; reads all of it. Some times as fast as a
    digest, and as strict while the memory is there. `moved` is told of bytes that were compared."""
    wanted = buffer_B.numpy()
    piece = np.empty(_PIECE_BYTES, dtype=np.uint8)
    with open(path, "rb", buffering=0) as file:
        for at in range(0, len(wanted), _PIECE_BYTES):
            expected = wanted[at : at + _PIECE_BYTES]
            got = piece[: len(expected)]
            if not _fill(file, memoryview(got)) or not _same_bytes(got, expected):
                return True
            moved(len(expected))
        return bool(file.read(1))


def _fill(file: FileIO, view: memoryview) -> bool:
    """Read until `view` is full; False where the file ends before."""
    at = 0
    while at < len(view):
        if not (count := file.readinto(view[at:])):
            return False
        at += count
    return True


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Eight bytes at a time, which takes a quarter of the time."""
    whole = len(one) // 8 * 8
    words = [array[:whole].view(np.uint64) for array in (one, other)]
    return np.array_equal(*words) and np.array_equal(one[whole:], other[whole:])


@dataclass(frozen=True)
class Later:
    """A tensor that is made when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    """Contiguous, of this type and number of elements, on any device."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, torch.Tensor]], *, metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write a new file and wait until it is on the disk; tensors are contiguous, on any device.

    Returns:
        Size in bytes and hex SHA-256.
    """
    later = [
        (key, Later(tensor.dtype, tuple(tensor.shape), partial(_same, tensor)))
        for key, tensor in tensors
    ]
    return write_later(path, later, metadata=metadata)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def write_later(
    path: Path, tensors: Sequence[tuple[str, Later]], *, metadata: Mapping[str, str]
) -> tuple[int, str]:
    """As `write_tensors`, with one tensor at a time in memory."""
    head, ordered = _header(tensors, metadata)
    file = HashingFile(path)
    try:
        file.write(head)
        for tensor in ordered:
            on_host = tensor.load().detach().to("cpu").view(-1).view(torch.uint8)
            assert on_host.numel() == tensor.num_bytes
            file.write(memoryview(on_host.numpy()))
        file.close()
    finally:
        file.discard()
    return file.size_bytes, file.sha256


class _Sized(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


def _header[T: _Sized](
    tensors: Sequence[tuple[str, T]], metadata: Mapping[str, str]
) -> tuple[bytes, list[T]]:
    """The first bytes of a file, and the tensors in the order in which they follow."""
    # The widest elements first keep every tensor aligned to its element size.
    ordered = sorted(tensors, key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]
