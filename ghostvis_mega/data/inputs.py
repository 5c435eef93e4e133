"""The files that a recipe reads: which they are, and whether they are still the same."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import sha256_file

_PREPARED = re.compile(r"\.gvd($|\.tmp-)")


def _below(folder: Path, skip: frozenset[Path]) -> Iterator[Path]:
    """Files of a folder in a fixed order; hidden ones and prepared datasets are no input.

    Links to folders are not followed: a link to a folder above would never end.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(".") or _PREPARED.search(entry.name) or path in skip:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _below(path, skip)
        elif not (entry.is_symlink() and path.is_dir()):
            yield path


def input_files(paths: Iterable[Path | None], *, skip: Iterable[Path]) -> list[Path]:
    """All files that `paths` are or hold, each once; what is in `skip` is passed over."""
    outputs = frozenset(skip)
    found: dict[Path, None] = {}
    for path in paths:
        if path is None:
            continue
        for file in _below(path, outputs) if path.is_dir() else [path]:
            found[file] = None
    return list(found)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}, which the recipe names, cannot be read: {error.strerror}")


def _absent(file: Path, error: OSError) -> bytes:
    """What stands for a link to nothing, which only the row that names it misses."""
    if not file.is_symlink():
        raise _unreadable(file, error) from error
    return b"absent %s\0" % os.fsencode(file)


def state_of(files: Iterable[Path]) -> str:
    """Hex digest of names, sizes and times of change: what a glance at the files tells."""
    digest = hashlib.sha256()
    for file in files:
        try:
            found = file.stat()
        except OSError as error:
            digest.update(_absent(file, error))
            continue
        digest.update(b"%d %d %s\0" % (found.st_size, found.st_mtime_ns, os.fsencode(file)))
    return digest.hexdigest()


def content_of(files: Iterable[Path]) -> str:
    """Hex digest of names and bytes: reads everything."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(b"%s %s\0" % (sha256_file(file).encode(), os.fsencode(file)))
        except OSError as error:
            digest.update(_absent(file, error))
    return digest.hexdigest()
