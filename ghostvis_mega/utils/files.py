"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the directory.

A rename within one file system is atomic on POSIX, but only data that reached the disk before it
survives a power cut, and the rename itself lives in the directory; hence the two fsyncs.
"""

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ghostvis_mega.utils.errors import DataError

_CHUNK_BYTES = 1 << 20
LARGEST_DOCUMENT = 64 << 20
"""Bytes of a YAML or JSON file that is read whole; far above any real one."""


def fsync_directory(path: Path) -> None:
    """Make renames and new names in directory `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A fresh sibling name of `path`: a rename from there never crosses a file system."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one."""
    temporary = temporary_name(path)
    done = False
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        done = True
    finally:
        if not done:
            temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def open_regular(path: Path) -> int:
    """A descriptor for reading a file that somebody else may have made.

    A pipe would wait for ever and a device has no end.

    Raises:
        OSError: the file cannot be opened, or is no regular one.
    """
    # Without O_NONBLOCK the call itself waits for somebody who writes into a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_small(path: Path, *, limit: int = LARGEST_DOCUMENT) -> bytes:
    """The content of a file of settings or a manifest.

    Raises:
        OSError: the file cannot be read, is no regular one, or is larger than `limit` bytes.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data


def prepare_output(path: Path) -> None:
    """Make the directory of a file that is to be written, before work is spent on its content.

    Raises:
        DataError: `path` is a directory, or its own cannot be made.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory: give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror} ({path.parent})") from error


def check_free(path: Path, *, force: bool) -> None:
    """Refuse to replace a file without `force`; else as `prepare_output`."""
    prepare_output(path)
    if path.exists() and not force:
        raise DataError(f"{path} exists already: give another name, or --force to replace it")


def write_output(path: Path, data: bytes) -> None:
    """`atomic_write` for a file that a user named; makes its directory.

    Raises:
        DataError: the file cannot be written, and why.
    """
    prepare_output(path)
    try:
        atomic_write(path, data)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error


def canonical_json(value: Any) -> bytes:
    """JSON bytes that depend on the value alone: sorted keys, two-space indent, final newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def document_digest(document: dict[str, Any]) -> str:
    """Hex SHA-256 of a document without its own key `digest`."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def atomic_write_json(path: Path, value: Any) -> None:
    """`atomic_write` of the canonical JSON of `value`."""
    atomic_write(path, canonical_json(value))


def unnoticed(num_bytes: int) -> None:
    """For bytes of which nobody needs to be told."""


def sha256_file(path: Path, *, moved: Callable[[int], None] = unnoticed) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces; `moved` is told of the size of each."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            moved(len(chunk))
    return digest.hexdigest()


class HashingFile:
    """A new file, written front to back, that knows its size and SHA-256 when it is closed."""

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=_CHUNK_BYTES)  # noqa: SIM115 - closed by close()
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @classmethod
    def resume(cls, path: Path, *, size: int) -> "HashingFile":
        """Go on behind the first `size` bytes of a file; what follows them is cut off.

        Raises:
            ValueError: the file is shorter.
        """
        self = cls.__new__(cls)
        self._file = open(path, "r+b", buffering=_CHUNK_BYTES)  # noqa: SIM115 - closed by close()
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        while self.size_bytes < size:
            chunk = self._file.read(min(_CHUNK_BYTES, size - self.size_bytes))
            if not chunk:
                self._file.close()
                raise ValueError(f"{path} ends before its byte {size}")
            self._digest.update(chunk)
            self.size_bytes += len(chunk)
        self._file.seek(size)
        self._file.truncate()
        return self

    def sync(self) -> None:
        """Bring what was written to the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)

    def close(self) -> None:
        """Flush to the disk and close; safe to call again."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Close without waiting for the disk, for files that are about to be deleted."""
        self._file.close()

    @property
    def sha256(self) -> str:
        """Hex digest of everything written so far."""
        return self._digest.hexdigest()
