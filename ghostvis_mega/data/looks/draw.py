"""Histograms, bars and a scatter as inline SVG; colours come from the page's style sheet."""

import html
import math
from collections.abc import Callable, Sequence

from ghostvis_mega.utils.format import si
from ghostvis_mega.utils.html.scales import linear_ticks, log_ticks

WIDTH, HEIGHT = 536, 232
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 14, 30
_FLOOR = HEIGHT - BOTTOM
_PLOT_WIDTH = WIDTH - LEFT - RIGHT


def figure(title: str, svg: str, *, note: str = "", legend: Sequence[tuple[str, str]] = ()) -> str:
    """A drawing with its title; `legend` pairs a name with a colour class."""
    keys = "".join(f'<span class="key {css}">{html.escape(name)}</span>' for name, css in legend)
    keys = f'<span class="legend">{keys}</span>' if keys else ""
    note = f'<span class="note">{html.escape(note)}</span>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}{note}{keys}</figcaption>'
        f"{svg}</figure>"
    )


def _svg(parts: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _y_axis(ticks: Sequence[float], place: Callable[[float], float]) -> list[str]:
    parts = []
    for value in ticks:
        y = place(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="ytick" x="{LEFT - 8}" y="{y + 3.5:.1f}">{html.escape(_tick(value))}'
            "</text>"
        )
    return parts


def _x_axis(
    ticks: Sequence[float],
    place: Callable[[float], float],
    text: Callable[[float], str],
) -> list[str]:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_FLOOR}" y2="{_FLOOR}"/>']
    for value in ticks:
        x = place(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_FLOOR}" y2="{_FLOOR + 4}"/>'
        )
        label = html.escape(text(value))
        parts.append(f'<text class="xtick" x="{x:.1f}" y="{_FLOOR + 18}">{label}</text>')
    return parts


def _tick(value: float) -> str:
    """As `si`, without digits that say nothing: 1.5k, not 1.50k."""
    if value < 1000:
        return f"{value:g}"
    number, prefix = si(value)[:-1], si(value)[-1]
    return f"{float(number):g}{prefix}"


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    label: str,
    text: Callable[[float], str] = _tick,
    marks: Sequence[tuple[float, str]] = (),
    css: str = "c1",
) -> str:
    """Bars between edges; each tells its numbers when pointed at. `marks` are named verticals."""
    low, high = edges[0], edges[-1]
    ticks = linear_ticks(0, max(1, *counts), count=4)

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * _PLOT_WIDTH

    def y(value: float) -> float:
        return _FLOOR - value / ticks[-1] * (_FLOOR - TOP)

    parts = _y_axis(ticks, y)
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            # A single sample among thousands must still be seen.
            top = min(y(count), _FLOOR - 1.0)
            parts.append(
                f'<rect class="column {css}" x="{x(left) + 0.5:.1f}" y="{top:.1f}" '
                f'width="{max(1.0, x(right) - x(left) - 1):.1f}" height="{_FLOOR - top:.1f}">'
                f"<title>{html.escape(f'{text(left)} to {text(right)}: {count:,}')}</title></rect>"
            )
    inside = [tick for tick in linear_ticks(low, high, count=6) if low <= tick <= high]
    parts += _x_axis(inside, x, text)
    for value, name in marks:
        place = min(max(x(value), LEFT), WIDTH - RIGHT)
        anchor = "end" if place > WIDTH / 2 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(
            f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{_FLOOR}"/>'
            f'<text class="marked" style="text-anchor:{anchor}" x="{place + shift:.1f}" '
            f'y="{TOP + 8}">{html.escape(name)}</text>'
        )
    return _svg(parts, label)


def scatter(points: Sequence[Sequence[int]], *, label: str) -> str:
    """Dots of (x, y, count) on logarithmic axes; the area of a dot grows with its count."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_range, y_range = log_ticks(min(xs), max(xs)), log_ticks(min(ys), max(ys))
    most = max(p[2] for p in points)

    def x(value: float) -> float:
        return LEFT + _share(value, x_range) * _PLOT_WIDTH

    def y(value: float) -> float:
        return _FLOOR - _share(value, y_range) * (_FLOOR - TOP)

    parts = _y_axis(_fine(y_range), y)
    parts += _x_axis(_fine(x_range), x, _tick)
    for width, height, count in sorted(points, key=lambda p: -p[2]):
        radius = 2.5 + 9 * math.sqrt(count / most)
        parts.append(
            f'<circle class="dot" cx="{x(width):.1f}" cy="{y(height):.1f}" r="{radius:.1f}">'
            f"<title>{width} x {height} pixels: {count:,}</title></circle>"
        )
    return _svg(parts, label)


def _share(value: float, ticks: Sequence[float]) -> float:
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    return (math.log10(max(value, ticks[0])) - low) / (high - low)


def _fine(powers: Sequence[float]) -> list[float]:
    """Few powers of ten say little: 1, 2, 5 between them."""
    if len(powers) > 3:
        return list(powers)
    values = [factor * power for power in powers for factor in (1, 2, 5)]
    return [value for value in values if powers[0] <= value <= powers[-1]]


def meter_rows(rows: Sequence[tuple[str, float, str, str]], *, most: float) -> str:
    """Horizontal bars of (name, value, text, colour class), all against `most`."""
    cells = "".join(
        f'<div class="meter-row {css}"><span class="name">{html.escape(name)}</span>'
        f'<span class="track"><i style="width:{100 * min(1.0, value / most):.2f}%"></i></span>'
        f'<span class="number">{html.escape(text)}</span></div>'
        for name, value, text, css in rows
    )
    return f'<div class="meters">{cells}</div>'


def shares(parts: Sequence[tuple[str, float, str, str]]) -> str:
    """One bar cut into shares of (name, amount, text, colour class), and its legend."""
    total = sum(amount for _, amount, _, _ in parts) or 1.0
    spans = "".join(
        f'<span class="{css}" style="width:{100 * amount / total:.3f}%" '
        f'title="{html.escape(f"{name}: {text}")}">'
        f"{f'{100 * amount / total:.0f} %' if amount / total >= 0.06 else ''}</span>"
        for name, amount, text, css in parts
    )
    legend = "".join(
        f'<li><i class="{css}"></i>{html.escape(name)} <b>{100 * amount / total:.1f} %</b>'
        f"<small>{html.escape(text)}</small></li>"
        for name, amount, text, css in parts
    )
    return f'<div class="bar">{spans}</div><ul class="phases">{legend}</ul>'
