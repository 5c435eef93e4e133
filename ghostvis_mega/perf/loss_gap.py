"""How far the losses of runs that should learn alike are apart.

The runs see the same batches in the same order, so what makes one batch harder than another is in
both losses and leaves their difference. What remains is that rounding, once different, grows: two
runs in the same precision come apart as well. How far these do is the noise that a gap has to be
seen against.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.jsonlines import read_metrics
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.figures import Figure, at_most, measured

WINDOW_SHARE = 10
"""One in so many steps, the last ones, is compared; moving means are as wide."""
SAMPLES = 20
"""Rows of the table of losses."""
_SAME_SPEED = 0.02
"""Medians of step times this close, as a fraction, are called equal."""


@dataclass(frozen=True)
class Curve:
    """What a run's metrics say, a step after the other from the first one."""

    name: str
    losses: list[float]
    """Nats; NaN where it was no number."""
    norms: list[float]
    seconds: list[float]
    skipped: int
    """Steps that changed no weight."""
    data: list[tuple[int, ...]] = field(repr=False)
    """What each step's batch held: tokens, trained tokens, images, samples."""

    @property
    def window(self) -> int:
        """Steps of the end that are compared."""
        return max(1, len(self.losses) // WINDOW_SHARE)

    @property
    def step_s(self) -> float:
        """Median time of a step, without the first ones, in which kernels are chosen."""
        return statistics.median(self.seconds[self.window :] or self.seconds)


def read_curve(name: str, path: Path, *, steps: int) -> Curve:
    """The run whose `metrics.jsonl` this is.

    Raises:
        DataError: It is no such file, or has not each of the steps once.
    """
    return curve_of(name, read_metrics(path, last_step=steps), steps=steps, path=path)


def curve_of(name: str, metrics: Sequence[StepMetrics], *, steps: int, path: Path) -> Curve:
    """Steps 1 to `steps` of a run.

    Raises:
        DataError: One is missing or there twice.
    """
    if [m.step for m in metrics] != list(range(1, steps + 1)):
        raise DataError(
            f"{path} holds {len(metrics)} lines for {steps} steps; each step must be there once, "
            "in order. Train the run again."
        )
    return Curve(
        name=name,
        losses=[m.loss for m in metrics],
        norms=[m.grad_norm for m in metrics],
        seconds=[m.seconds for m in metrics],
        skipped=sum(m.skipped for m in metrics),
        data=[(m.tokens, m.trained_tokens, m.images, m.samples) for m in metrics],
    )


def compare_losses(
    base: Curve,
    twins: Sequence[Curve],
    others: Sequence[Curve],
    *,
    bar_percent: float,
    alone: bool,
) -> list[Figure]:
    """Rows of name, value, unit, bar and ok.

    Args:
        base: The run that the others are held against.
        twins: Runs that differ from it by rounding alone: the noise.
        others: Runs whose gap has the bar.
        bar_percent: The largest gap either way, of the mean loss of the last steps.
        alone: Whether each run had the device for itself, so that step times can be compared.
    """
    noise = max((abs(_last_gap(base, twin)) for twin in twins), default=math.nan)
    rows = [row for curve in (base, *twins, *others) for row in _own_rows(curve, alone=alone)]
    for twin in twins:
        rows += _gap_rows(base, twin, bar_percent=None)
    rows.append(measured(f"noise: largest gap of {base.name} to itself", noise, "%"))
    for other in others:
        rows += _gap_rows(base, other, bar_percent=bar_percent)
        gap = _last_gap(base, other)
        rows.append(measured(f"{other.name}: finding", finding(gap, noise, bar_percent)))
        rows.append(measured(f"{other.name}: speed", speed(base, other, alone=alone)))
    # JSON has no NaN.
    return [row | {"value": None} if row["value"] != row["value"] else row for row in rows]


def _own_rows(curve: Curve, *, alone: bool) -> list[Figure]:
    last = f"mean of the last {curve.window} steps"
    shared = "" if alone else ", device shared"
    return [
        measured(f"{curve.name}: loss, {last}", _mean(curve.losses[-curve.window :]), "nats"),
        measured(f"{curve.name}: loss, mean of all steps", _mean(curve.losses), "nats"),
        measured(f"{curve.name}: gradient norm, {last}", _mean(curve.norms[-curve.window :])),
        measured(f"{curve.name}: median step{shared}", curve.step_s, "s"),
        at_most(f"{curve.name}: steps left out", curve.skipped, "steps", 0),
    ]


def _gap_rows(base: Curve, other: Curve, *, bar_percent: float | None) -> list[Figure]:
    """Gaps in percent of `base`, positive where `other` is higher."""
    window, name = base.window, f"{other.name} against {base.name}"
    gap = _last_gap(base, other)
    ok = None if bar_percent is None else bool(abs(gap) <= bar_percent)
    moving = [
        _percent(ours, theirs)
        for ours, theirs in zip(
            _moving_means(other.losses, window), _moving_means(base.losses, window), strict=True
        )
    ]
    # NaN is the largest of all: it must not hide behind a number.
    worst = max(range(len(moving)), key=lambda i: (math.isnan(moving[i]), abs(moving[i])))
    norms = [_mean(c.norms[-window:]) for c in (other, base)]
    all_norms = [_mean(c.norms) for c in (other, base)]
    return [
        measured(f"{name}: gap of the last {window} steps", gap, "%", bar=bar_percent, ok=ok),
        measured(f"{name}: gap of all steps", _percent(*map(_mean, _losses(other, base))), "%"),
        measured(
            f"{name}: gap of the first step, equal weights",
            _percent(other.losses[0], base.losses[0]),
            "%",
        ),
        measured(f"{name}: largest gap of {window} steps' moving mean", moving[worst], "%"),
        measured(f"{name}: the moving mean's largest gap is at step", worst + window),
        measured(f"{name}: gradient norm's gap of the last {window} steps", _percent(*norms), "%"),
        measured(f"{name}: gradient norm's gap of all steps", _percent(*all_norms), "%"),
        at_most(
            f"{name}: steps with other data",
            sum(ours != theirs for ours, theirs in zip(other.data, base.data, strict=True)),
            "steps",
            0,
        ),
    ]


def finding(gap: float, noise: float, bar_percent: float) -> str:
    """What a gap means beside the noise, all in percent."""
    if math.isnan(gap):
        return "a loss was no number"
    if math.isnan(noise):
        return f"a gap of {gap:+.3f} %; no second run to tell it from noise"
    beside = f"the {noise:.3f} % by which runs come apart that differ in rounding alone"
    if abs(gap) > noise:
        return f"a gap of {gap:+.3f} %, above {beside}"
    sentence = f"a gap of {gap:+.3f} % is no finding: it is within {beside}"
    if noise > bar_percent:
        sentence += f"; that is more than the bar of {bar_percent:g} %, so compare more steps"
    return sentence


def speed(base: Curve, other: Curve, *, alone: bool) -> str:
    """Whether `other` is slower, in one sentence."""
    if not alone:
        return "not told: runs shared the device, so leave out --side-by-side to compare times"
    ratio = other.step_s / base.step_s
    times = f"a step takes {other.step_s:.4f} s, in {base.name} {base.step_s:.4f} s"
    if ratio > 1 + _SAME_SPEED:
        return f"SLOWER than {base.name}, {ratio:.2f} times the time: {times}"
    if ratio < 1 - _SAME_SPEED:
        return f"faster than {base.name}, {1 / ratio:.2f} times as fast: {times}"
    return f"as fast as {base.name}: {times}"


def losses_table(curves: Sequence[Curve]) -> str:
    """Mean losses of up to `SAMPLES` equal parts of the steps, as a Markdown table."""
    steps = len(curves[0].losses)
    parts = min(SAMPLES, steps)
    lines = [
        "| steps | " + " | ".join(curve.name for curve in curves) + " |",
        "|---" * (len(curves) + 1) + "|",
    ]
    for part in range(parts):
        start, end = part * steps // parts, (part + 1) * steps // parts
        means = [f"{_mean(curve.losses[start:end]):.4f}" for curve in curves]
        lines.append(f"| {start + 1}-{end} | " + " | ".join(means) + " |")
    return "\n".join(lines)


def _last_gap(base: Curve, other: Curve) -> float:
    return _percent(*(_mean(losses[-base.window :]) for losses in _losses(other, base)))


def _losses(*curves: Curve) -> list[list[float]]:
    return [curve.losses for curve in curves]


def _moving_means(values: Sequence[float], width: int) -> list[float]:
    return [_mean(values[end - width : end]) for end in range(width, len(values) + 1)]


def _mean(values: Sequence[float]) -> float:
    """NaN where one of the values is."""
    return math.fsum(values) / len(values)


def _percent(value: float, base: float) -> float:
    return 100 * (value / base - 1) if base else math.nan
