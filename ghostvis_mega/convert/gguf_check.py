"""A GGUF file's header against the file's own length, before anything believes it.

The library that reads these files takes counts and lengths as they are: an array that claims 2^60
numbers keeps it busy for ever, and arrays inside of arrays exhaust its stack.
"""

import mmap
import struct
from pathlib import Path

from ghostvis_mega.utils.files import open_regular

_MAGIC = b"GGUF"
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by the code of its type."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_SMALLEST_TENSOR = 8 + 4 + 4 + 8


class _Header:
    """A place in the file that only moves forward."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes behind it."""
        return len(self._data) - self._at

    def number(self, code: str) -> int:
        """One number of `struct`'s code."""
        size = struct.calcsize(code)
        start = self._at
        self.skip(1, size)
        return struct.unpack_from(code, self._data, start)[0]

    def skip(self, count: int, size: int) -> None:
        """Pass over `count` things of `size` bytes."""
        if count * size > self.left:
            raise ValueError(
                f"byte {self._at} begins {count} values, and the file has {self.left} bytes more"
            )
        self._at += count * size

    def text(self) -> None:
        """Pass over a string."""
        self.skip(self.number("<Q"), 1)

    def value(self) -> None:
        """Pass over a value with its type."""
        kind = self.number("<I")
        count = 1
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            if count * 8 > self.left:
                raise ValueError(f"it claims {count} texts in its last {self.left} bytes")
            for _ in range(count):
                self.text()
        elif kind in _WIDTHS:
            self.skip(count, _WIDTHS[kind])
        else:
            raise ValueError(f"it has a value of type {kind}, which is not read")


def check_header(path: Path) -> None:
    """Walk over the header of a file.

    Raises:
        OSError: The file cannot be read, or is no regular one.
        ValueError: It is no GGUF file of version 2 or 3, or claims more than it holds.
    """
    with (
        open(open_regular(path), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if data[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        header = _Header(data)
        header.skip(4, 1)
        if (version := header.number("<I")) not in (2, 3):
            raise ValueError(f"it has version {version}; 2 and 3 are read")
        tensors, settings = header.number("<Q"), header.number("<Q")
        if tensors * _SMALLEST_TENSOR > header.left or settings * (8 + 4 + 1) > header.left:
            raise ValueError(f"it claims {tensors} tensors and {settings} settings")
        for _ in range(settings):
            header.text()
            header.value()
        for _ in range(tensors):
            header.text()
            if (dimensions := header.number("<I")) > _MOST_DIMENSIONS:
                raise ValueError(f"it has a tensor of {dimensions} dimensions")
            header.skip(dimensions, 8)
            header.skip(1, 4 + 8)
