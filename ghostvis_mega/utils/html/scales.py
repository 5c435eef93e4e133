"""Axis arithmetic: ticks at round numbers, and long curves cut down to what a screen can show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def linear_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def step_ticks(first: int, last: int, *, count: int = 6) -> list[int]:
    """Whole multiples inside [first, last] for a step axis."""
    return [
        int(tick)
        for tick in linear_ticks(first, last, count=count)
        if first <= tick <= last and tick == int(tick)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that span [low, high], both positive."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(first + 1, math.ceil(math.log10(high) - 1e-9))
    return [10.0**power for power in range(first, last + 1)]


@dataclass(frozen=True)
class Bucket:
    """Some neighbouring steps of a curve; the values are NaN when none of them was finite."""

    step: int
    low: float
    mean: float
    high: float


def buckets(steps: Sequence[int], values: Sequence[float], *, limit: int) -> list[Bucket]:
    """At most `limit` buckets of equal size; spikes stay visible in `low` and `high`."""
    size = max(1, math.ceil(len(steps) / limit))
    result = []
    for start in range(0, len(steps), size):
        finite = [value for value in values[start : start + size] if math.isfinite(value)]
        step = steps[min(start + size, len(steps)) - 1]
        if finite:
            result.append(Bucket(step, min(finite), math.fsum(finite) / len(finite), max(finite)))
        else:
            result.append(Bucket(step, math.nan, math.nan, math.nan))
    return result
