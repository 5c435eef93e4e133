"""How much of a run's time moved it forward, since its first launch, and where the rest went.

`goodput.jsonl` in the run folder only grows: a line when a process starts, when it is ready to
train, after some steps, when steps are undone. A killed process leaves at most its last line torn;
the time up to the next launch then counts as `restart`. All seconds between the first launch and
now are in exactly one of `PARTS`. Launches on nodes whose clocks differ are put one after the
other: what lies between two of them is then as long as the clocks say, and nothing at the least.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostvis_mega.train.lines import LineFile
from ghostvis_mega.train.observers.base import Summary

log = logging.getLogger(__name__)

LEDGER = "goodput.jsonl"
PARTS = (
    "productive", "data", "start-up", "save", "skipped", "lost", "restart", "evaluation", "other",
)  # fmt: skip
"""Steps that count, less their wait for data (also a launch's first, with what is compiled in it);
that wait; from a process's start to the beginning of its first step; training stopped for a save;
steps left out; steps done and then undone; between a process's last line and the next one's start;
answers to held-out questions; everything else."""
_LEAST_S = 1.0
_RARE = 2000
"""A line is written after this share of the run's time, but not more often than each second."""


@dataclass
class Account:
    """Seconds by part, from the lines of a ledger in their order."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    first: float | None = None
    """Unix time of the first launch."""
    last: float = 0.0
    """Unix time of the last line, by the clock of the first launch."""
    launches: int = 0
    _behind: float = 0.0
    """What the clock of the last launch lacks for its lines to follow those before it."""
    _kept: list[tuple[int, int, float, float]] = field(default_factory=list)
    """(first step, last step, productive, data) of steps that could still be undone."""

    def add(self, row: dict[str, Any]) -> None:
        """Count a line.

        Raises:
            KeyError, TypeError, ValueError: It is no line of ours.
        """
        kind, clock = row["kind"], float(row["time"])
        if self.first is None:
            self.first = self.last = clock
        if kind == "launch" and clock >= self.last:
            self._behind = 0.0  # another node, or a clock that was put right
        # Not for this line alone: those after it are by the same clock.
        self._behind += max(0.0, self.last - self.at(clock))
        passed = max(0.0, self.at(clock) - self.last)
        self.last += passed
        if kind == "launch":
            self.launches += 1
            self.seconds["restart"] += passed
        elif kind == "ready":
            self.seconds["start-up"] += passed
            self.undo(int(row["step"]))
        elif kind == "undone":
            self.seconds["other"] += passed
            self.undo(int(row["step"]))
        elif kind == "time":
            self._add_steps(row, passed)
        else:
            raise ValueError(f"no kind {kind!r}")

    def _add_steps(self, row: dict[str, Any], passed: float) -> None:
        parts = {part: float(row.get(part, 0.0)) for part in PARTS}
        parts["other"] += max(0.0, passed - sum(parts.values()))
        for part, seconds in parts.items():
            self.seconds[part] += seconds
        if row["last"] >= row["first"]:
            kept = (int(row["first"]), int(row["last"]), parts["productive"], parts["data"])
            self._kept.append(kept)

    def at(self, clock: float) -> float:
        """What a time by the clock of the last launch is by the clock of the first."""
        return clock + self._behind

    def undo(self, step: int) -> None:
        """Steps after `step` will be done again, or left out: what they took is lost."""
        while self._kept and self._kept[-1][1] > step:
            first, last, productive, data = self._kept.pop()
            share = 1.0 if first > step else (last - step) / (last - first + 1)
            self.seconds["productive"] -= share * productive
            self.seconds["data"] -= share * data
            self.seconds["lost"] += share * (productive + data)
            if share < 1.0:
                rest = 1.0 - share
                self._kept.append((first, step, rest * productive, rest * data))

    @property
    def wall_s(self) -> float:
        """Seconds since the first launch."""
        return 0.0 if self.first is None else self.last - self.first

    @property
    def share(self) -> float:
        """Productive time over wall time; 0 before any time has passed."""
        return self.seconds["productive"] / self.wall_s if self.wall_s > 0 else 0.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; one that is torn or not ours is left out with a warning."""
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            Account().add(row)
        except (ValueError, KeyError, TypeError):
            log.warning("%s, line %d, is torn or not ours; left out", path, number)
            continue
        rows.append(row)
    return rows


def read_account(path: Path) -> Account:
    """What a ledger comes to."""
    account = Account()
    for row in read_rows(path):
        account.add(row)
    return account


class Goodput:
    """Accounts for the time of this process and all before it.

    Args:
        path: The ledger; None: this process alone, nothing is written.
        started: Unix time at which this process was started.
    """

    def __init__(self, path: Path | None, *, started: float | None = None):
        self._ledger = None if path is None else LineFile(path)
        self.account = Account() if path is None else read_account(path)
        # A clock that does not jump within a process, on the scale of one that all share.
        self._offset = time.time() - time.monotonic()
        self._parts: dict[str, float] = {}
        self._first, self._last = 0, -1
        self._line({"kind": "launch"}, at=self._now() if started is None else started)

    def ready(self, *, start: int) -> None:
        """Training begins, with `start` steps done."""
        self._line({"kind": "ready", "step": start})

    def step(self, done: int, *, seconds: float, data: float, skipped: bool) -> None:
        """Account for a step, which waited `data` of its `seconds` for data."""
        if self._last < self._first:
            self._first = done
        self._last = done
        if skipped:
            self._take("skipped", seconds)
        else:
            self._take("data", data)
            self._take("productive", seconds - data)
        since = self.account.at(self._now()) - self.account.last
        if since >= max(_LEAST_S, self.account.wall_s / _RARE):
            self.write()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside belongs to this part."""
        assert name in PARTS
        if name == "save":
            # A resumed run begins at a save: lines end there.
            self.write()
        began = time.monotonic()
        yield
        self._take(name, time.monotonic() - began)
        self.write()

    def undo(self, step: int) -> None:
        """Steps after `step` were done for nothing."""
        self.write()
        self._line({"kind": "undone", "step": step})

    def write(self) -> None:
        """Bring the ledger up to now."""
        row = {"kind": "time", "first": self._first, "last": self._last}
        self._line(row | {part: round(value, 4) for part, value in self._parts.items()})
        self._parts, self._first, self._last = {}, self._last + 1, self._last

    @property
    def share(self) -> float:
        """Productive time over wall time up to now."""
        first = self.account.first
        wall = 0.0 if first is None else self.account.at(self._now()) - first
        known = self.account.seconds["productive"] + self._parts.get("productive", 0.0)
        return known / wall if wall > 0 else 0.0

    def summary(self) -> Summary:
        """`goodput`, and `goodput_seconds` by part, up to the last line."""
        parts = {part: round(value, 2) for part, value in self.account.seconds.items()}
        return {"goodput": round(self.account.share, 4), "goodput_seconds": parts}

    def _take(self, part: str, seconds: float) -> None:
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def _now(self) -> float:
        return time.monotonic() + self._offset

    def _line(self, row: dict[str, Any], *, at: float | None = None) -> None:
        row["time"] = round(self._now() if at is None else at, 4)
        self.account.add(row)
        if self._ledger is not None:
            self._ledger.append(row)
