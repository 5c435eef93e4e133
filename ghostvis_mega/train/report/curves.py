"""Which curves the report shows."""

import math
from itertools import accumulate

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import ordered_modules
from ghostvis_mega.train.report.charts import Chart, Series
from ghostvis_mega.utils.format import si

MODULE_CSS = {"llm": "c1", "vision": "c2", "resampler": "c3", "projector": "c4"}


def run_charts(steps: list[StepMetrics]) -> list[Chart]:
    """Loss, gradient norm, learning rates, throughput and, over several ranks, how pictures were
    spread."""
    loss = [m.loss for m in steps]
    norm = [m.grad_norm for m in steps]
    rate = [m.tokens_per_s for m in steps]
    charts = [
        Chart("Loss", _raw_and_smooth(steps, loss, "c1"), _number, "{:.4f}".format, allow_log=True),
        Chart(
            "Gradient norm",
            _raw_and_smooth(steps, norm, "c2"),
            _number,
            "{:.3f}".format,
            allow_log=True,
        ),
        Chart("Learning rate", _learning_rates(steps), _power, "{:.3e}".format),
        Chart("Useful tokens per second", _raw_and_smooth(steps, rate, "c3"), short_si, si),
    ]
    if any(math.isfinite(m.goodput) for m in steps):
        share = Series("goodput", [m.step for m in steps], [m.goodput for m in steps], "c4")
        charts.append(Chart("Goodput since the first launch", (share,), _number, "{:.3f}".format))
    # One rank has nothing to share out and nobody to send to.
    if any(m.dispatch.get("sent_max", 0.0) > 0 for m in steps):
        imbalance = [m.dispatch.get("imbalance") or math.nan for m in steps]
        charts.append(
            Chart(
                "Patches of the busiest rank over the mean",
                _raw_and_smooth(steps, imbalance, "c2"),
                _number,
                "{:.3f}".format,
            )
        )
        charts.append(
            Chart(
                "Embedding bytes that a rank sends",
                _sent(steps),
                short_si,
                lambda value: si(value) + "B",
            )
        )
    return charts


def centred_mean(values: list[float], *, half: int) -> list[float]:
    """Mean of each value and up to `half` neighbours on either side, NaN and inf left out.

    The window shrinks towards both ends alike, so that a falling curve is not dragged along.
    """
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(v if ok else 0.0 for v, ok in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    result = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        first, stop = place - reach, place + reach + 1
        count = counts[stop] - counts[first]
        result.append((sums[stop] - sums[first]) / count if count else math.nan)
    return result


def _raw_and_smooth(
    steps: list[StepMetrics], values: list[float], css: str
) -> tuple[Series, Series]:
    """The values as they are, faint, and smoothed over a twenty-fifth of the run."""
    numbers = [m.step for m in steps]
    mean = centred_mean(values, half=max(1, min(200, len(values) // 50)))
    return (
        Series("each step", numbers, values, css, faint=True),
        Series("smoothed", numbers, mean, css),
    )


def _learning_rates(steps: list[StepMetrics]) -> tuple[Series, ...]:
    """One curve a module, or a single one where all modules share theirs."""
    numbers = [m.step for m in steps]
    modules = ordered_modules(steps[-1].lr)
    curves = {
        name: Series(
            name, numbers, [m.lr.get(name, math.nan) for m in steps], MODULE_CSS.get(name, "c5")
        )
        for name in modules
    }
    distinct = {tuple(series.values) for series in curves.values()}
    if len(curves) > 1 and len(distinct) == 1:
        first = curves[modules[0]]
        return (Series("all modules", numbers, first.values, first.css),)
    return tuple(curves.values())


def _sent(steps: list[StepMetrics]) -> tuple[Series, ...]:
    """Bytes a step of the mean rank and of the one that sends most."""
    numbers = [m.step for m in steps]
    return tuple(
        Series(name, numbers, [m.dispatch.get(key, math.nan) for m in steps], css)
        for name, key, css in (("mean", "sent_mean", "c1"), ("most", "sent_max", "c4"))
    )


def _number(value: float) -> str:
    return f"{value:.6g}"


def short_si(value: float) -> str:
    """`8k` instead of `8.00k`: ticks are round numbers."""
    text = si(value)
    if value < 1000 or "." not in text:
        return text
    return text[:-1].rstrip("0").rstrip(".") + text[-1]


def _power(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")
