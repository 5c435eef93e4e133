"""What is told and kept of a benchmark while it runs: a killed one loses one row at most."""

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ghostvis_mega.perf.train_bench.plans import Plan
from ghostvis_mega.perf.train_bench.results import (
    ALLOCATED,
    DATA_WAIT,
    LOSS_FIRST,
    LOSS_LAST,
    MFU,
    MFU_FP8,
    RESERVED,
    STEP_MAX_S,
    STEP_MIN_S,
    STEP_S,
    TFLOPS,
    TOKENS,
    RowResult,
    ratio_figures,
    row_figures,
    row_values,
    settled_bars,
)
from ghostvis_mega.perf.train_bench.rows import Bar, Row
from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.errors import ConfigError, DataError
from ghostvis_mega.utils.figures import Figure, measured
from ghostvis_mega.utils.files import canonical_json, write_output

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_RATES = (TOKENS, TFLOPS, MFU, MFU_FP8)
_TIMES = (STEP_S, STEP_MIN_S, STEP_MAX_S, DATA_WAIT)
_REST = (ALLOCATED, RESERVED, LOSS_FIRST, LOSS_LAST)


class Stopped(BaseException):
    """A signal asks the benchmark to end; no `except Exception` may take it for a row's failure."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Raise `Stopped` inside where the first SIGTERM or SIGINT arrives; main thread only.

    Later ones are ignored until the block ends: what ends the ranks must not be interrupted.
    """
    told = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def summary_lines(result: RowResult) -> list[str]:
    """A row in few lines for people: speed, time, memory and loss, and its trace."""
    if result.failure:
        return [f"{'does not fit' if result.excused else 'failed'}: {result.failure}"]
    values = row_values(result)
    lines = []
    for names in (_RATES, _TIMES, _REST):
        parts = []
        for name in names:
            value, unit = values.get(name, (None, ""))
            if value is not None:
                parts.append(f"{name} {value:.4g} {unit}")
        lines.append("; ".join(parts))
    if result.trace:
        parts = [f"{entry['name']} {entry['value']:.3g} {entry['unit']}" for entry in result.trace]
        lines.append("traced: " + "; ".join(parts))
    return lines


@dataclass
class Bench:
    """A benchmark while it runs."""

    title: str
    plan: Plan
    chosen: Sequence[Row]
    file: Path | None
    """Kept up to date; None keeps nothing."""
    results: list[RowResult] = field(default_factory=list)
    """Of rows that have ended, in the order of `chosen`."""

    def add(self, result: RowResult) -> None:
        """Take over a row that has ended: tell of it and keep it."""
        self.results.append(result)
        level = logging.ERROR if result.failure and not result.excused else logging.INFO
        for line in summary_lines(result):
            log.log(level, "%s: %s", result.name, line)
        self.save()

    def bars(self) -> list[Bar]:
        """The promises about single rows, as far as rows have ended."""
        return settled_bars(self.plan.bars, self.results)

    def figures(self) -> list[Figure]:
        """All figures that there are: of rows, their ratios, and what they ran on."""
        rows = [f for result in self.results for f in row_figures(result, self.bars())]
        rows += ratio_figures(self.results, self.plan.ratios)
        ran = next((result for result in self.results if not result.failure), None)
        if ran is not None:
            rows.append(measured("device", f"{ran.processes} x {ran.device}"))
        versions = package_versions().items()
        return rows + [measured(f"version of {name}", text) for name, text in versions]

    def save(self) -> None:
        """Replace the file by all that there is; readers see the old or the new one, whole.

        Raises:
            ConfigError: The file cannot be written.
        """
        if self.file is None:
            return
        content = {
            "title": self.title,
            "figures": self.figures(),
            "rows": [dataclasses.asdict(result) for result in self.results],
        }
        try:
            write_output(self.file, canonical_json(content))
        except DataError as error:
            raise ConfigError([f"--save: {error}."]) from error
