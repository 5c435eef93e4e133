"""What a row of the training benchmark came to, and the figures that follow from it."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostvis_mega.perf.train_bench.rows import ALTERNATIVES, Bar, Ratio, Row
from ghostvis_mega.utils.figures import Figure, at_least, at_most, measured
from ghostvis_mega.utils.hardware import device_peak

GIB = 1024**3
CONVENTION = (
    "FLOPs: Megatron-LM's convention: causal attention halved, the head on trained positions "
    "included, what is computed a second time not counted; each distinct picture of a step counts "
    "once. Tokens: useful ones, image positions included, padding not."
)
STEP_S, STEP_MIN_S, STEP_MAX_S = "step, median", "step, fastest", "step, slowest"
TOKENS, IMAGES = "useful tokens", "pictures"
TFLOPS, TFLOPS_LLM, TFLOPS_VISION = "model FLOPs", "model FLOPs, LLM", "model FLOPs, vision"
MFU, MFU_FP8 = "MFU of the BF16 peak", "MFU of the FP8 peak"
ALLOCATED, RESERVED = "peak allocated", "peak reserved"
DATA_WAIT, IMBALANCE = "data wait", "vision imbalance"
_NO_MEMORY = re.compile(r"OutOfMemoryError|out of memory|CUBLAS_STATUS_ALLOC_FAILED")
LOSS_FIRST, LOSS_LAST = "loss of the first step", "loss of the last step"


@dataclass(frozen=True)
class StepRecord:
    """One step of the whole job."""

    loss: float
    tokens: int
    """Useful ones."""
    trained_tokens: int
    images: int
    """Distinct ones."""
    flops_llm: float
    flops_vision: float
    data_s: float
    """Wait for data."""
    sections: dict[str, float]
    """Seconds by part."""
    seconds: float = math.nan
    """From the end of the step before to the end of this one."""
    imbalance: float | None = None
    """Patches of the busiest rank over the mean; None where nobody shares them out."""


@dataclass(frozen=True)
class RowResult:
    """A row that ran, or why it did not."""

    name: str
    kind: str
    processes: int = 1
    warm_up: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    """All of them, the warm-up first."""
    allocated_bytes: int | None = None
    """Most on one device; None on a CPU."""
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    """Memory that one device has."""
    device: str = ""
    on_gpu: bool = False
    fp8: bool = False
    description: dict[str, str] = field(default_factory=dict)
    """What it ran with, as it says itself."""
    trace: list[dict[str, Any]] = field(default_factory=list)
    """Figures of the traced step."""
    failure: str = ""
    may_not_fit: bool = False
    """Running out of memory is no failure of the benchmark."""

    @property
    def excused(self) -> bool:
        """It failed as it may: for want of memory."""
        return self.may_not_fit and bool(_NO_MEMORY.search(self.failure))

    @property
    def timed(self) -> list[StepRecord]:
        """The steps that count."""
        return self.steps[self.warm_up :]

    def write(self, path: Path) -> None:
        """Store it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "RowResult":
        """What `write` stored."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["steps"] = [StepRecord(**step) for step in values["steps"]]
        return cls(**values)


def failed(row: Row, reason: str) -> RowResult:
    """A row that did not run to its end."""
    return RowResult(name=row.name, kind=row.kind, failure=reason, may_not_fit=row.may_not_fit)


def row_values(result: RowResult) -> dict[str, tuple[float | None, str]]:
    """Value and unit of every figure of a row that ran, in the order in which they are shown.

    Rates are medians over the timed steps, each by its own length; shares are of all their time.
    """
    steps, count = result.timed, result.processes
    whole = sum(step.seconds for step in steps)

    def rate(amount: Callable[[StepRecord], float], scale: float = 1.0) -> float:
        return statistics.median(amount(s) / s.seconds for s in steps) / count / scale

    seconds = [step.seconds for step in steps]
    tflops = rate(lambda s: s.flops_llm + s.flops_vision, 1e12)
    values: dict[str, tuple[float | None, str]] = {
        STEP_S: (statistics.median(seconds), "s"),
        STEP_MIN_S: (min(seconds), "s"),
        STEP_MAX_S: (max(seconds), "s"),
        TOKENS: (rate(lambda s: s.tokens), "/s/GPU"),
        TFLOPS: (tflops, "TFLOP/s/GPU"),
        TFLOPS_LLM: (rate(lambda s: s.flops_llm, 1e12), "TFLOP/s/GPU"),
    }
    if any(step.images for step in steps):
        values[IMAGES] = (rate(lambda s: s.images), "/s/GPU")
        values[TFLOPS_VISION] = (rate(lambda s: s.flops_vision, 1e12), "TFLOP/s/GPU")
        shares = [step.imbalance for step in steps if step.imbalance is not None]
        if shares:
            values[IMBALANCE] = (statistics.median(shares), "x the mean")
    peak = device_peak(result.device) if result.on_gpu else None
    if peak is not None:
        values[MFU] = (100 * tflops * 1e12 / peak.bf16, "%")
        if result.fp8 and peak.fp8:
            values[MFU_FP8] = (100 * tflops * 1e12 / peak.fp8, "%")
    for name, size in ((ALLOCATED, result.allocated_bytes), (RESERVED, result.reserved_bytes)):
        if size is not None:
            values[name] = (size / GIB, "GiB")
    values[DATA_WAIT] = (100 * sum(s.data_s for s in steps) / whole, "% of the step")
    for part in dict.fromkeys(name for step in steps for name in step.sections):
        share = sum(step.sections.get(part, 0.0) for step in steps) / whole
        values[f"time in {part}"] = (100 * share, "% of the step")
    values[LOSS_FIRST] = (result.steps[0].loss, "nats")
    values[LOSS_LAST] = (result.steps[-1].loss, "nats")
    return values


def row_figures(result: RowResult, bars: Sequence[Bar] = ()) -> list[Figure]:
    """Rows of name, value, unit, bar and ok. A loss that did not fall is a miss: what does not
    train is no comparison."""
    if result.failure:
        if result.excused:
            return [measured(f"{result.name}: does not fit", result.failure)]
        return [measured(f"{result.name}: failed", result.failure, ok=False)]
    promised = {bar.figure: bar for bar in bars if bar.row == result.name}
    figures = []
    for name, (value, unit) in row_values(result).items():
        full, bar = f"{result.name}: {name}", promised.get(name)
        if name == LOSS_LAST and len(result.steps) > 1:
            falls = bool(value is not None and value < result.steps[0].loss)
            figures.append(measured(full, value, unit, bar=result.steps[0].loss, ok=falls))
        elif bar is None or value is None:
            figures.append(measured(full, value, unit))
        elif bar.least is not None:
            figures.append(at_least(full, value, unit, bar.least))
        else:
            figures.append(at_most(full, value, unit, bar.most))
    return figures + [
        measured(f"{result.name}: traced, {entry['name']}", entry["value"], entry["unit"])
        for entry in result.trace
    ]


def fastest(results: Iterable[RowResult]) -> RowResult | None:
    """The one with the most achieved TFLOP/s of a device; None if none ran."""
    ran = (result for result in results if not result.failure)
    return max(ran, key=lambda result: row_values(result)[TFLOPS][0] or 0.0, default=None)


def settled_bars(bars: Iterable[Bar], results: Sequence[RowResult]) -> list[Bar]:
    """Bars with one name each: of several, that of the fastest so far."""
    settled = []
    for bar in bars:
        names = bar.row.split(ALTERNATIVES)
        best = fastest(result for result in results if result.name in names)
        settled.append(bar if best is None else dataclasses.replace(bar, row=best.name))
    return settled


def ratio_figures(results: Sequence[RowResult], ratios: Sequence[Ratio]) -> list[Figure]:
    """Two figures a ratio: by achieved TFLOP/s, which the bar is for, and by useful tokens/s; where
    the fastest of several counts, also which rows these are.

    A ratio of rows of which none was asked for is left out; one with a side on which none ran
    cannot be had and misses its bar. A promise to be ahead of several is judged only where all of
    them were asked for: one that was left out might be the fastest.
    """
    by_name = {result.name: result for result in results}
    figures = []
    for ratio in ratios:
        sides = [
            [by_name[name] for name in names if name in by_name]
            for names in (ratio.rows, ratio.overs)
        ]
        if not all(sides):
            continue
        least = ratio.least if len(sides[1]) == len(ratio.overs) else None
        ours, theirs = (fastest(side) for side in sides)
        if ours is None or theirs is None:
            bad = None if least is None else False
            figures.append(measured(f"{ratio.name}, {TFLOPS}", None, "x", bar=least, ok=bad))
            continue
        mine, other = row_values(ours), row_values(theirs)
        by_flops = mine[TFLOPS][0] / other[TFLOPS][0]
        figures.append(at_least(f"{ratio.name}, {TFLOPS}", by_flops, "x", least))
        figures.append(measured(f"{ratio.name}, {TOKENS}", mine[TOKENS][0] / other[TOKENS][0], "x"))
        if ALTERNATIVES in ratio.row + ratio.over:
            figures.append(measured(f"{ratio.name}, rows", f"{ours.name} / {theirs.name}"))
    return figures
