"""Files of a run that only grow, a line of JSON at a time."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from ghostvis_mega.train.metrics import finite_or_none

log = logging.getLogger(__name__)


class LineFile:
    """Lines that explain a run but that it does not need: one that cannot be written is lost, with
    one warning until lines can be written again.

    Args:
        path: Of the file; its folder is made when needed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lost = 0
        """Lines since the last that was written."""

    def append(self, row: dict[str, Any]) -> None:
        """Add a line of strict JSON."""
        self.write(json.dumps(finite_or_none(row), allow_nan=False))

    def write(self, line: str) -> None:
        """Add a line, which has no end yet."""
        try:
            _append(self.path, f"{line}\n".encode())
        except OSError as error:
            if self.lost == 0:
                log.warning(
                    "%s cannot be written: %s. Training goes on; its lines are lost until it can",
                    self.path, error.strerror or error,
                )  # fmt: skip
            self.lost += 1
            return
        if self.lost:
            log.warning("%s is written again; lines that were lost: %d", self.path, self.lost)
            self.lost = 0


def _append(path: Path, line: bytes) -> None:
    """Add a line in one write, so that it is whole or the last and torn.

    What a process that was killed left torn is ended first, so that it spoils no other line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = b"\n" + line if torn else line
        if os.write(descriptor, content) < len(content):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
