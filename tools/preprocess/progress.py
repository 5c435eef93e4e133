"""How far a command is, on stderr: how many, how fast, how long still."""

import sys
import time
from collections.abc import Callable
from functools import partial

from ghostvis_mega.data.readers.meter import Meters
from ghostvis_mega.utils.format import duration, si

_LINE_SECONDS = 5.0
_REDRAW_SECONDS = 0.2
_STEP_SECONDS = 2.0


class Progress:
    """Rows, rate and time left on stderr: one line redrawn in a terminal, else a line now and then.

    Args:
        total: rows that there are, where that is known.
        meters: how much of the input has been read, where rows are not counted beforehand.
    """

    def __init__(
        self,
        *,
        total: int | None = None,
        meters: Meters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._meters, self._clock = total, meters, clock
        self._first_share: float | None = None
        self._started = self._printed = clock()
        self._first: int | None = None
        self._terminal = sys.stderr.isatty()
        self._drawn = False

    def __call__(self, rows: int, rejected: int) -> None:
        """Called often; prints seldom."""
        now = self._clock()
        if self._first is None:  # rows of an interrupted run took no time in this one
            self._first, self._first_share = rows, self._share(rows)
        if now - self._printed < (_REDRAW_SECONDS if self._terminal else _LINE_SECONDS):
            return
        self._printed = now
        line = self._line(rows, rejected, now)
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._drawn = True
        else:
            print(line, file=sys.stderr, flush=True)

    def _line(self, rows: int, rejected: int, now: float) -> str:
        rate = (rows - (self._first or 0)) / max(now - self._started, 1e-9)
        line = f"{rows} rows, {rejected} rejected, {si(rate)} rows/s"
        share, first = self._share(rows), self._first_share or 0.0
        if share is not None and share > first:
            left = (now - self._started) * (1 - share) / (share - first)
            line = f"{line}, {100 * share:.0f} %, {duration(left)} left"
        return line

    def _share(self, rows: int) -> float | None:
        if self._total is not None:
            return min(1.0, rows / self._total)
        return self._meters.share if self._meters is not None else None

    def end(self) -> None:
        """Leave the redrawn line."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Steps:
    """A line now and then about work of known size, which may be several things one after the
    other."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = ""
        self._clock = clock
        self._started = self._told = clock()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Called often; prints if the last line is old enough."""
        now = self._clock()
        if what != self._what:
            self._what, self._started = what, now
        if now - self._told < _STEP_SECONDS:
            return
        self._told = now
        rate = done / max(now - self._started, 1e-9)
        left = duration((total - done) / rate) if rate else "-"
        print(f"{what}: {si(done)} of {si(total)}, {si(rate)}/s, {left} left", file=sys.stderr)


def counting(what: str) -> Callable[[int, int], None]:
    """A printer of how many of all are done."""
    return partial(Steps(), what)
