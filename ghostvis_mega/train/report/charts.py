"""Line charts as inline SVG; the colours come from the page's style sheet."""

import html
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from ghostvis_mega.utils.html.scales import (
    Bucket,
    buckets,
    linear_ticks,
    log_ticks,
    step_ticks,
)

WIDTH, HEIGHT = 536, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 26
MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One curve. `css` is its colour class; a faint one is drawn as the envelope of its values."""

    name: str
    steps: list[int]
    values: list[float]
    css: str
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps, with how to write a value of the y axis and of the hover text."""

    title: str
    series: tuple[Series, ...]
    tick: Callable[[float], str]
    value: Callable[[float], str]
    allow_log: bool = False
    """Use a logarithmic axis when the values span more than a factor of 50."""


@dataclass(frozen=True)
class Axes:
    """Where data lands in the drawing."""

    first: int
    last: int
    y_ticks: tuple[float, ...]
    log: bool

    def x(self, step: int) -> float:
        """Horizontal position of a step."""
        span = max(1, self.last - self.first)
        return LEFT + (step - self.first) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical position of a value; values below a logarithmic axis sit on its floor."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def draw_chart(chart: Chart) -> str:
    """A `<figure>` with the chart, its legend and the data that the hover script reads."""
    curves = [(s, buckets(s.steps, s.values, limit=MAX_POINTS)) for s in chart.series]
    finite = [b for _, points in curves for b in points if math.isfinite(b.mean)]
    title = html.escape(chart.title)
    if not finite:
        return (
            f'<figure class="chart"><figcaption>{title}</figcaption><p>no values yet</p></figure>'
        )
    axes = _axes(chart, finite)
    paths = "".join(_path(series, points, axes) for series, points in curves)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f'{_grid(axes, chart.tick)}{paths}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        "</svg>"
    )
    note = '<span class="note">log scale</span>' if axes.log else ""
    return (
        f'<figure class="chart"><figcaption>{title}{note}{_legend(chart)}</figcaption>'
        f'<div class="plot">{svg}<div class="tip" hidden></div></div>'
        f'<script type="application/json">{_hover_data(chart, curves, axes)}</script></figure>'
    )


def _axes(chart: Chart, finite: list[Bucket]) -> Axes:
    low = min(b.low for b in finite)
    high = max(b.high for b in finite)
    log = chart.allow_log and low > 0 and high / low > 50
    ticks = log_ticks(low, high) if log else linear_ticks(min(0.0, low), high)
    # The axis begins where the run did: before its first step.
    first = min(series.steps[0] for series in chart.series) - 1
    last = max(series.steps[-1] for series in chart.series)
    return Axes(first=first, last=last, y_ticks=tuple(ticks), log=log)


def _grid(axes: Axes, tick: Callable[[float], str]) -> str:
    parts = []
    for value in axes.y_ticks:
        y = axes.y(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        label = html.escape(tick(value))
        parts.append(f'<text class="ytick" x="{LEFT - 8}" y="{y + 3.5:.1f}">{label}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for step in step_ticks(axes.first, axes.last):
        x = axes.x(step)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>'
        )
        parts.append(f'<text class="xtick" x="{x:.1f}" y="{floor + 17}">{step}</text>')
    parts.append(f'<text class="xname" x="{LEFT - 18}" y="{floor + 17}">step</text>')
    return "".join(parts)


def _path(series: Series, points: list[Bucket], axes: Axes) -> str:
    """Polyline of the means, or of the low and high ends for a faint series; NaN breaks it."""
    commands = []
    pen = "M"
    for b in points:
        if not math.isfinite(b.mean):
            pen = "M"
            continue
        values = (b.low, b.high) if series.faint and b.low != b.high else (b.mean,)
        for value in values:
            commands.append(f"{pen}{axes.x(b.step):.1f} {axes.y(value):.1f}")
            pen = "L"
    kind = "curve faint" if series.faint else "curve"
    return f'<path class="{kind} {html.escape(series.css)}" d="{"".join(commands)}"/>'


def _legend(chart: Chart) -> str:
    if len(chart.series) < 2:
        return ""
    items = "".join(
        f'<span class="key {html.escape(s.css)}{" faint" if s.faint else ""}">'
        f"{html.escape(s.name)}</span>"
        for s in chart.series
    )
    return f'<span class="legend">{items}</span>'


def _hover_data(chart: Chart, curves: list[tuple[Series, list[Bucket]]], axes: Axes) -> str:
    """JSON for the hover script: positions as fractions of the drawing, texts ready to show."""
    steps = [b.step for b in curves[0][1]]
    data = {
        "step": steps,
        "x": [round(axes.x(step) / WIDTH, 4) for step in steps],
        "series": [
            {"name": series.name, "text": [_hover_text(chart, b) for b in points]}
            for series, points in curves
        ],
    }
    # "<" could end the script element that the JSON stands in.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _hover_text(chart: Chart, b: Bucket) -> str:
    return chart.value(b.mean) if math.isfinite(b.mean) else "not finite"
