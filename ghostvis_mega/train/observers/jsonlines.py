"""One JSON line a step for machines."""

import math
from pathlib import Path

from ghostvis_mega.train.lines import LineFile
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary, step_mfu
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import atomic_write


def read_metrics(path: Path, *, last_step: int) -> list[StepMetrics]:
    """Steps up to `last_step` from a metrics file, in order.

    The last line may be torn, because a run can die while it writes; any other line that is not a
    step is an error.

    Raises:
        DataError: a line before the last is not a step.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    steps = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            m = StepMetrics.from_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}, is not the metrics of a step ({error}); "
                "move the file away to start a new one"
            ) from error
        if m.step <= last_step:
            steps.append(m)
    return steps


class JsonLines:
    """Writes `metrics.jsonl` a closed line a step: it can be followed and survives a crash."""

    def __init__(self, path: Path):
        self._path, self._lines = path, LineFile(path)
        self._run: RunInfo = {"total_steps": 0}

    def on_start(self, run: RunInfo) -> None:
        """Begin the file; steps after the one that the run resumed from are dropped."""
        self._run = run
        self._path.parent.mkdir(parents=True, exist_ok=True)
        start = run.get("start_step", 0)
        kept = []
        if start and self._path.exists():
            kept = read_metrics(self._path, last_step=start)
        atomic_write(self._path, "".join(f"{self._line(m)}\n" for m in kept).encode("utf-8"))

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
