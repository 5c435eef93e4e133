"""One JSON line a step for machines."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from ghostvis_mega.train.lines import LineFile
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary, step_mfu
from ghostvis_mega.utils.errors import DataError


def read_metrics(path: Path, *, last_step: int) -> list[StepMetrics]:
    """Steps up to `last_step` from a metrics file, in order.

    The last line may be torn, because a run can die while it writes; any other line that is not a
    step is an error.

    Raises:
        DataError: a line before the last is not a step.
    """
    return [m for m, _ in _whole_lines(path) if m.step <= last_step]


def _whole_lines(path: Path) -> Iterator[tuple[StepMetrics, int]]:
    """Each step, and the bytes of its line."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            m = StepMetrics.from_json(line.decode())
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}, is not the metrics of a step ({error}); "
                "move the file away to start a new one"
            ) from error
        yield m, len(line) + 1


class JsonLines:
    """Writes `metrics.jsonl` a closed line a step: it can be followed and survives a crash."""

    def __init__(self, path: Path):
        self._path, self._lines = path, LineFile(path)
        self._run: RunInfo = {"total_steps": 0}

    def on_start(self, run: RunInfo) -> None:
        """Steps after the one that the run resumed from are cut off, which takes no room on the
        disk; the first line makes the file.

        Raises:
            DataError: a line before the last is not a step.
        """
        self._run = run
        if not self._path.exists():
            return
        kept, start = 0, run.get("start_step", 0)
        for m, num_bytes in _whole_lines(self._path) if start else ():
            if m.step > start:
                break
            kept += num_bytes
        os.truncate(self._path, kept)

    def _line(self, m: StepMetrics) -> str:
        mfu = step_mfu(m, self._run)
        extra = {
            "tokens_per_s": m.tokens_per_s,
            "images_per_s": m.images_per_s,
            "mfu": math.nan if mfu is None else mfu,
        }
        return m.to_json(extra)

    def on_step(self, m: StepMetrics) -> None:
        """Append the step."""
        self._lines.write(self._line(m))

    def on_preview(self, step: int, previews: list[Preview]) -> None:
        """Previews have pictures and belong to the report."""

    def on_end(self, summary: Summary) -> None:
        """The summary has a file of its own."""
