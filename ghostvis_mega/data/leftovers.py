"""What killed runs leave beside a dataset: NAME.gvd.tmp-*, taken back or removed."""

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghostvis_mega.data.manifest import MANIFEST_FILE
from ghostvis_mega.utils.errors import DataError

log = logging.getLogger(__name__)

BUILD_MARK = ".tmp-build-"


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Make `directory` and keep other builds out of it; a killed process lets go by itself.

    Raises:
        DataError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another build is at work in {directory}: wait for it") from error
    finally:
        os.close(descriptor)


def _is_held(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def clear_files(path: Path) -> None:
    """Remove half-written files of dead runs that were to become `path`."""
    pattern = re.compile(re.escape(path.name) + r"\.tmp-(\d+)-[0-9a-f]{8}")
    for file in sorted(path.parent.glob(f"{path.name}.tmp-*")):
        match = pattern.fullmatch(file.name)
        if match is not None and file.is_file() and not _is_alive(int(match[1])):
            file.unlink()


def clear_leftovers(path: Path, *, keep: Path | None = None, file: str = MANIFEST_FILE) -> None:
    """Remove directories of dead runs that were to become `path`.

    A dataset that was moved aside by a run killed before the new one took its place is moved back.

    Args:
        keep: directory that the caller goes on with.
        file: what a whole directory holds.
    """
    pattern = re.compile(re.escape(path.name) + r"\.tmp-(\d+)-[0-9a-f]{8}(-old)?")
    for directory in sorted(path.parent.glob(f"{path.name}.tmp-*")):
        if directory == keep or not directory.is_dir():
            continue
        match = pattern.fullmatch(directory.name)
        if directory.name.startswith(path.name + BUILD_MARK):
            if _is_held(directory):
                continue
        elif match is None or _is_alive(int(match[1])):
            continue
        elif match[2] and not path.exists() and (directory / file).is_file():
            os.replace(directory, path)
            continue
        log.info("removing %s, which a stopped run left", directory)
        shutil.rmtree(directory)
