"""Stacked bars: the mean step of rank 0, and all time since the first launch."""

import html
from collections.abc import Mapping

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Summary
from ghostvis_mega.utils.format import duration, percent

PHASES = ("data", "vision", "exchange", "llm", "optimizer")
_GOODPUT_CSS = {
    "productive": "t4",
    "data": "t1",
    "start-up": "t2",
    "save": "t3",
    "evaluation": "t5",
}
_CSS = {"data": "t1", "vision": "t2", "exchange": "t3", "llm": "t4", "optimizer": "t5"}


def mean_timing(steps: list[StepMetrics]) -> dict[str, float]:
    """Mean seconds a step by phase, the known phases first, "other" last.

    The first step warms up and would distort the picture: it is left out once there are others.
    """
    counted = steps[1:] or steps
    names = {name for m in counted for name in m.timing}
    ordered = [name for name in PHASES if name in names] + sorted(names - set(PHASES))
    means = {n: sum(m.timing.get(n, 0.0) for m in counted) / len(counted) for n in ordered}
    means["other"] = sum(m.other_s for m in counted) / len(counted)
    return means


def draw_timing(steps: list[StepMetrics]) -> str:
    """The bar and its legend; empty before the first step."""
    if not steps:
        return ""
    means = mean_timing(steps)
    return _bar(means, _CSS, hint=f"Mean step of rank 0: {duration(sum(means.values()))}")


def draw_goodput(account: Summary) -> str:
    """All wall time since the first launch by part; empty where it is not known."""
    if not any(account.get("goodput_seconds", {}).values()):
        return ""
    seconds = {name: value for name, value in account["goodput_seconds"].items() if value > 0}
    hint = f"Goodput {percent(account['goodput'])} of {duration(sum(seconds.values()))}"
    return _bar(seconds, _GOODPUT_CSS, hint=hint)


def _bar(parts: Mapping[str, float], classes: Mapping[str, str], *, hint: str) -> str:
    total = sum(parts.values())
    segments, legend = [], []
    for name, seconds in parts.items():
        share = seconds / total
        css = classes.get(name, "t0")
        label = html.escape(name)
        inside = percent(share, 0) if share >= 0.06 else ""
        segments.append(f'<span class="{css}" style="width:{100 * share:.3f}%">{inside}</span>')
        legend.append(
            f'<li><i class="{css}"></i>{label}<b>{duration(seconds)}</b>'
            f"<small>{percent(share)}</small></li>"
        )
    return (
        f'<div class="panel"><div class="bar">{"".join(segments)}</div>'
        f'<ul class="phases">{"".join(legend)}</ul>'
        f'<p class="hint">{html.escape(hint)}</p></div>'
    )
