"""Figures: what commands print as rows of name, value, unit, bar and ok."""

from collections.abc import Iterable
from typing import TypedDict


class Figure(TypedDict):
    """One row. Its keys in this order are what `--json` shows."""

    name: str
    value: float | str | None
    """None: it could not be had."""
    unit: str
    bar: float | None
    """The promised figure."""
    ok: bool | None
    """Whether the promise is kept; None: nothing is promised."""


def measured(
    name: str,
    value: float | str | None,
    unit: str = "",
    *,
    bar: float | None = None,
    ok: bool | None = None,
) -> Figure:
    """A figure without a bar, or with a verdict that is more than a comparison with its bar."""
    return {"name": name, "value": value, "unit": unit, "bar": bar, "ok": ok}


def at_most(name: str, value: float, unit: str, bar: float | None) -> Figure:
    """A figure that is fine up to `bar`; NaN is not. Without a bar there is no verdict."""
    return measured(name, value, unit, bar=bar, ok=None if bar is None else bool(value <= bar))


def at_least(name: str, value: float, unit: str, bar: float | None) -> Figure:
    """A figure that is fine from `bar` on; NaN is not. Without a bar there is no verdict."""
    return measured(name, value, unit, bar=bar, ok=None if bar is None else bool(value >= bar))


def any_missed(figures: Iterable[Figure]) -> bool:
    """Whether some promise is not kept."""
    return any(figure["ok"] is False for figure in figures)
