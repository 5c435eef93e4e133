"""How much of the input has been read, for the time that is left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any


class Meter:
    """What one reader has read of its input, in bytes or rows, whichever it knows."""

    def __init__(self, weight: int = 1):
        """Begin with nothing expected; `weight` is the share of this input among several."""
        self.weight = weight
        self._total = self._done = 0
        self._position: Callable[[], int] | None = None

    def expect(self, count: int) -> None:
        """There are `count` more bytes or rows to read."""
        self._total += count

    def add(self, count: int) -> None:
        """So many of them have been read."""
        self._done += count

    @contextmanager
    def reading(self, file: IO[Any], size: int) -> Iterator[None]:
        """While `file` of `size` expected bytes is open, its position counts."""
        raw = file.buffer if isinstance(file, TextIOWrapper) else file
        self._position = raw.tell
        try:
            yield
        finally:
            self._position = None
            self._done += size

    @property
    def share(self) -> float | None:
        """From 0 to 1; None as long as the reader does not know how much there is."""
        if self._total <= 0:
            return None
        inside = self._position() if self._position is not None else 0
        return min(1.0, (self._done + inside) / self._total)


class Meters:
    """Several inputs, read one after the other."""

    def __init__(self) -> None:
        self._parts: list[Meter] = []

    def part(self, weight: int) -> Meter:
        """A meter for the next input; `weight` is its size, as far as that can be compared."""
        self._parts.append(Meter(weight))
        return self._parts[-1]

    @property
    def share(self) -> float | None:
        """Of all inputs; None where that cannot be known yet."""
        total = sum(part.weight for part in self._parts)
        if total <= 0 or self._parts[0].share is None:
            return None
        return sum(part.weight * (part.share or 0.0) for part in self._parts) / total


def size_of(path: Path) -> int:
    """Bytes of a file or of all files below a folder; 0 if there is none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
