"""Files of a run that only grow, a line of JSON at a time."""

import json
import os
from pathlib import Path
from typing import Any

from ghostvis_mega.train.metrics import finite_or_none


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add a line of strict JSON in one write, so that it is whole or the last and torn.

    What a process that was killed left torn is ended first, so that it spoils no other line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(finite_or_none(row), allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" + line if torn else line)
    finally:
        os.close(descriptor)
