"""Facts about this process that Python does not tell."""

import os
import time
from pathlib import Path

_START_FIELD = 22
"""Of /proc/self/stat, counted from 1."""


def process_started() -> float:
    """Unix time at which this process was started, to a hundredth of a second; where there is no
    /proc, now."""
    if not Path("/proc/uptime").exists():
        return time.time()
    # The second field is the program's name, which may hold blanks and brackets.
    rest = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(rest[_START_FIELD - 3])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
