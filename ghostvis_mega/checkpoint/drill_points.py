"""Every place at which a save changes the disk, as a point where a process may end.

While `watch` is open, the calls that change a file system are counted and named: making, writing,
bringing to the disk, renaming and deleting files and directories. Production code knows nothing of
it, so a call that somebody adds is counted as well.
"""

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WATCHED = ("mkdir", "fsync", "replace", "unlink", "rmdir")


@dataclass
class Points:
    """What a save did, and what happens at each point.

    Args:
        at: Called before each point with its number and name, and half-way through each write.
    """

    at: Callable[[int, str], None]
    names: list[str] = field(default_factory=list)
    _inside: bool = False

    def pass_by(self, name: str) -> None:
        """A point is reached; what `at` does to the disk itself is none."""
        if self._inside:
            return
        self.names.append(name)
        self._inside = True
        try:
            self.at(len(self.names) - 1, name)
        finally:
            self._inside = False


@contextmanager
def watch(points: Points) -> Iterator[None]:
    """Count and name all changes of the file system by this process."""
    real = {name: getattr(os, name) for name in _WATCHED}
    real_open = builtins.open

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            points.pass_by(f"{name} {_label(args[0])}")
            return real[name](*args, **options)

        return call

    def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+") or "b" not in mode:
            return real_open(file, mode, *args, **options)
        points.pass_by(f"create {_label(file)}")
        raw = _Raw(file, mode.replace("b", ""), points)
        return io.BufferedWriter(raw, max(options.get("buffering", 0), io.DEFAULT_BUFFER_SIZE))

    for name in _WATCHED:
        setattr(os, name, watched(name))
    builtins.open = watched_open
    try:
        yield
    finally:
        builtins.open = real_open
        for name, function in real.items():
            setattr(os, name, function)


class _Raw(io.FileIO):
    """A file whose writes are two points: before it, and with half of it on its way."""

    def __init__(self, file: Any, mode: str, points: Points):
        super().__init__(file, mode)
        self._points, self._label = points, _label(file)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._points.pass_by(f"write {self._label}")
        written = super().write(view[: len(view) // 2]) or 0
        self._points.pass_by(f"half of write {self._label}")
        return written + (super().write(view[written:]) or 0)


def _label(file: Any) -> str:
    """A short name, the same in every trial."""
    if isinstance(file, int):
        file = os.readlink(f"/proc/self/fd/{file}")
    path = Path(os.fsdecode(file))
    own = path.name.split(".tmp-")[0]
    return f"{path.parent.name}/{own}" if path.parent.name.startswith("step-") else own


class PowerCut:
    """What a disk may hold after a power cut, at every point of a save.

    Two cases at each: names as they are but data that was not brought to the disk gone (files as
    long as they were then, or empty), and new names and renames gone whose directory was not.

    Args:
        folder: Whose content counts.
        out: Existing directory for the copies, `NUMBER-data` and `NUMBER-names`.
    """

    def __init__(self, folder: Path, out: Path):
        self.folder, self.out = folder, out
        self._rename = os.replace
        self._synced: dict[Path, int] = {}
        """Length on the disk of files that were written since."""
        self._created: set[Path] = set()
        self._renames: list[tuple[Path, Path]] = []

    def copy(self, number: int, name: str) -> None:
        """Both cases at this point."""
        data, names = self.out / f"{number:03d}-data", self.out / f"{number:03d}-names"
        for target in (data, names):
            shutil.copytree(self.folder, target)
        for path, length in self._synced.items():
            if (lost := data / path.relative_to(self.folder)).exists():
                os.truncate(lost, length)
        for path in self._created:
            (names / path.relative_to(self.folder)).unlink(missing_ok=True)
        for old, new in reversed(self._renames):
            renamed = names / new.relative_to(self.folder)
            if renamed.exists():
                self._rename(renamed, names / old.relative_to(self.folder))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """As the function of this name; every change is remembered until it is on the disk."""
        with watch(Points(at=self.copy)):
            watched = os.fsync, os.replace, builtins.open
            fsync, replace, opened = watched

            def synced(descriptor: int) -> None:
                fsync(descriptor)
                path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                self._synced.pop(path, None)
                self._created = {own for own in self._created if own.parent != path}
                self._renames = [pair for pair in self._renames if pair[1].parent != path]

            def renamed(old: Any, new: Any) -> None:
                replace(old, new)
                self._moved(Path(old), Path(new))

            def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
                found = opened(file, mode, *args, **options)
                if isinstance(getattr(found, "raw", None), _Raw) and self._is_own(file):
                    self._created.add(Path(file))
                    self._synced[Path(file)] = 0
                return found

            os.fsync, os.replace, builtins.open = synced, renamed, watched_open
            try:
                yield
            finally:
                os.fsync, os.replace, builtins.open = watched

    def _is_own(self, file: Any) -> bool:
        return not isinstance(file, int) and Path(file).is_relative_to(self.folder)

    def _moved(self, old: Path, new: Path) -> None:
        def place(path: Path) -> Path:
            return new / path.relative_to(old) if path.is_relative_to(old) else path

        self._renames.append((old, new))
        self._synced = {place(path): length for path, length in self._synced.items()}
        self._created = {place(path) for path in self._created}
