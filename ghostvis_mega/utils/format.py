"""Numbers as people read them: 12.3k, 4.5 %, 3m07s."""

import math

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float) -> str:
    """Three significant digits with a decimal prefix: `950`, `12.3k`, `1.54M`."""
    if not math.isfinite(value):
        return str(value)
    for factor, prefix in _PREFIXES:
        # 999.5 and more would round up to four digits.
        if abs(value) >= factor * 0.9995:
            return f"{_three_digits(value / factor)}{prefix}"
    return f"{value:.0f}" if value == int(value) else _three_digits(value)


def _three_digits(value: float) -> str:
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """`850 ms`, `42.0s`, `3m07s`, `2h05m` or `3d04h`."""
    if not math.isfinite(seconds):
        return "-"
    if seconds == 0:
        return "0s"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h"


def percent(fraction: float, digits: int = 1) -> str:
    """`0.4123` as `41.2 %`."""
    return f"{100 * fraction:.{digits}f} %"
