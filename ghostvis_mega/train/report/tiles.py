"""The numbers one wants first, as tiles."""

import math

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import RunInfo, Summary, step_mfu
from ghostvis_mega.utils.format import duration, percent, si
from ghostvis_mega.utils.html.page import tile


def draw_tiles(run: RunInfo, steps: list[StepMetrics], summary: Summary | None) -> str:
    """Accuracy, loss, speed, time and what was seen; tiles without numbers yet are left out."""
    tiles = [_accuracy(summary)]
    if steps:
        tiles += [_loss(steps), _speed(run, steps), _time(steps, summary or {}), _seen(steps)]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _accuracy(summary: Summary | None) -> str:
    label = "Held-out accuracy"
    if summary is None:
        return tile(label, "-", "measured at the end, if asked for", css="main")
    if "heldout_accuracy" not in summary:
        return tile(label, "-", "not measured in this run", css="main")
    accuracy = summary["heldout_accuracy"]
    ceiling = summary.get("question_only_accuracy")
    below, marker = "", ""
    if ceiling is not None:
        below = f"question alone: {percent(ceiling)}"
        marker = f'<i class="ceiling" style="left:{100 * ceiling:.2f}%"></i>'
    if "num_questions" in summary:
        below = " · ".join([*([below] if below else []), f"{summary['num_questions']:,} asked"])
    meter = f'<div class="meter"><i style="width:{100 * accuracy:.2f}%"></i>{marker}</div>'
    return tile(label, percent(accuracy), below, css="main", extra=meter)


def _loss(steps: list[StepMetrics]) -> str:
    # Single steps are noisy and a long mean lags behind: the last tenth, at most 20 steps.
    recent = [m.loss for m in steps[-max(1, min(20, len(steps) // 10)) :]]
    finite = [loss for loss in recent if math.isfinite(loss)]
    last = math.fsum(finite) / len(finite) if finite else math.nan
    return tile(
        "Loss", _loss_text(last), f"from {_loss_text(steps[0].loss)} at step {steps[0].step}"
    )


def _loss_text(loss: float) -> str:
    return f"{loss:.4g}" if math.isfinite(loss) else "not finite"


def _speed(run: RunInfo, steps: list[StepMetrics]) -> str:
    counted = steps[1:] or steps
    seconds = sum(m.seconds for m in counted)
    below = f"{si(sum(m.images for m in counted) / seconds)} images/s"
    rates = [rate for m in counted if (rate := step_mfu(m, run)) is not None]
    if rates:
        below += f" · MFU {percent(sum(rates) / len(rates))}"
    return tile("Useful tokens/s", si(sum(m.tokens for m in counted) / seconds), below)


def _time(steps: list[StepMetrics], summary: Summary) -> str:
    stepping = sum(m.seconds for m in steps)
    below = f"{len(steps)} steps of {duration(stepping / len(steps))}"
    return tile("Time", duration(summary.get("seconds", stepping)), below)


def _seen(steps: list[StepMetrics]) -> str:
    tokens = sum(m.tokens for m in steps)
    below = f"{si(sum(m.images for m in steps))} images"
    return tile("Tokens seen", si(tokens), below)
