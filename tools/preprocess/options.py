"""Options that several commands share, and how their progress and results are printed."""

import json
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.readers.meter import Meters
from ghostvis_mega.utils.format import duration, si

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes that decode and tokenise; the result is the same.")
]
Images = Annotated[Path | None, typer.Option(help="Folder of the images.")]
Annotations = Annotated[Path | None, typer.Option(help="Second file of rows (vqav2).")]


class Packing(StrEnum):
    """How samples share packed sequences."""

    BALANCED = "balanced"
    BFD = "bfd"
    CONCAT = "concat"


class TooLong(StrEnum):
    """What becomes of samples longer than a sequence."""

    DROP = "drop"
    TRUNCATE = "truncate-at-turn"
    SPLIT = "split-text"


TooLongOption = Annotated[
    TooLong,
    typer.Option(
        "--too-long",
        help="Samples longer than a sequence: leave out, keep the turns that fit, or cut documents;"
        " never inside an image.",
    ),
]
SegmentAlign = Annotated[
    int | None, typer.Option(min=1, help="Round each sample of a sequence up to such a multiple.")
]
ContextParallel = Annotated[
    int,
    typer.Option(min=1, help="parallel.context of the run; aligns samples to twice as much."),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=2, help="Cut documents (never conversations) to this."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first rows only.")]

_LINE_SECONDS = 5.0
_REDRAW_SECONDS = 0.2


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, sort_keys=True))


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
