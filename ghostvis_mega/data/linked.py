"""Files of one dataset that become those of another, with shared bytes where that can be."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.data.manifest import read_manifest

_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)
"""Another file system, or one without hard links."""


@dataclass(frozen=True)
class LinkedFile:
    """A finished file, for a writer that lists it beside those that it writes."""

    size_bytes: int
    sha256: str

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Never called: the file belongs to another dataset."""
        raise ValueError("a linked file cannot be written")

    def sync(self) -> None:
        """It was written long ago."""

    def close(self) -> None:
        """It is not open."""

    def discard(self) -> None:
        """It is not open."""


def link_media(parent: Path, directory: Path) -> dict[str, LinkedFile]:
    """Bring all pictures of dataset `parent` into `directory` by hard links, else by copying."""
    linked = {}
    for name, info in read_manifest(parent).files.items():
        if not name.startswith("media/"):
            continue
        try:
            os.link(parent / name, directory / name)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            shutil.copyfile(parent / name, directory / name)
        linked[name] = LinkedFile(info.bytes, info.sha256)
    return linked
