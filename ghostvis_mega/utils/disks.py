"""Which file system a path lies on, and whether that is a disk."""

import os
import shutil
import tempfile
from pathlib import Path

_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mountinfo")


def nearest_existing(path: Path) -> Path:
    """The path, or the closest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def kind_of_filesystem(path: Path) -> str:
    """Such as `ext4` or `tmpfs`; empty where the system does not tell.

    By the device number, which a mount below another one has of its own.
    """
    if not _MOUNTS.exists():
        return ""
    number = os.stat(nearest_existing(path)).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in _MOUNTS.read_text().splitlines():
        # 36 35 98:0 /root /mount options [tags ...] - kind source more
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0]
    return ""


def disk_problem(folder: Path | None, *, num_bytes: int, option: str) -> str | None:
    """Why files of this size should not be written there to time a disk; None: nothing against it.

    Args:
        folder: May not exist yet; None is the system's for temporary files.
        num_bytes: That must fit.
        option: That names another folder.
    """
    place = nearest_existing(folder or Path(tempfile.gettempdir()))
    kind, free = kind_of_filesystem(place), shutil.disk_usage(place).free
    needs = f"{num_bytes / 1e9:.3f} GB"
    if kind in _IN_MEMORY:
        return (
            f"{place} lies in memory ({kind}): what is written there says nothing about a disk, "
            f"and takes {needs} of the memory. Name a folder on a disk with {option}."
        )
    if free < num_bytes:
        return (
            f"{place} has {free / 1e9:.3f} GB left, and {needs} are needed. Make room, or name "
            f"another folder with {option}."
        )
    return None
