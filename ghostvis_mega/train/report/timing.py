"""The mean step of rank 0 as one stacked bar."""

import html

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.utils.format import duration, percent

PHASES = ("data", "vision", "exchange", "llm", "optimizer")
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
    total = sum(means.values())
    segments, legend = [], []
    for name, seconds in means.items():
        share = seconds / total
        css = _CSS.get(name, "t0")
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
        f'<p class="hint">Mean step of rank 0: {duration(total)}</p></div>'
    )
