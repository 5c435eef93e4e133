"""The tables of `ghostvis bench train`."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ghostvis_mega.perf.train_bench.results import (
    CONVENTION,
    RowResult,
    row_figures,
    row_values,
)
from ghostvis_mega.perf.train_bench.rows import Bar
from ghostvis_mega.utils.environment import package_versions

_FIGURE_WIDTH, _ROW_WIDTH = 46, 14
_COUNTS = 1000
"""From here on a value is a count and shown to its last digit."""


def print_tables(results: Sequence[RowResult], *, bars: Sequence[Bar], title: str) -> None:
    """Figures down, rows of the benchmark across; then what each ran with, and its trace."""
    ran = [result for result in results if not result.failure]
    values = {result.name: row_values(result) for result in ran}
    console = Console()
    # Where nobody has set a width, as in a log, a column a row must still be readable.
    console.width = max(console.width, _FIGURE_WIDTH + _ROW_WIDTH * len(values))
    missed = {
        figure["name"]
        for result in ran
        for figure in row_figures(result, bars)
        if figure["ok"] is False
    }
    table = Table(title=f"{title}: medians over the timed steps; ! misses its bar")
    for heading in ("figure", "unit", *values):
        side = "left" if heading in ("figure", "unit") else "right"
        table.add_column(heading, justify=side, overflow="fold")
    units = {name: unit for found in values.values() for name, (_, unit) in found.items()}
    for name, unit in units.items():
        cells = []
        for row, found in values.items():
            value = found.get(name, (None, ""))[0]
            mark = " !" if f"{row}: {name}" in missed else ""
            cells.append("" if value is None else f"{value:.4g}{mark}")
        table.add_row(name, unit, *cells)
    if ran:
        console.print(table)
    for result in results:
        told = "; ".join(f"{name}: {text}" for name, text in result.description.items())
        console.print(f"{result.name}: {result.failure or told}", highlight=False, markup=False)
    _print_traces(console, ran)
    versions = ", ".join(f"{name} {text}" for name, text in package_versions().items())
    if ran:
        console.print(f"{ran[0].processes} x {ran[0].device}; {versions}", highlight=False)
    console.print(CONVENTION, highlight=False)


def _print_traces(console: Console, results: Sequence[RowResult]) -> None:
    traced = [result for result in results if result.trace]
    for result in traced:
        table = Table(title=f"{result.name}: one step under the profiler")
        table.add_column("what", overflow="fold")
        table.add_column("value", justify="right")
        table.add_column("unit")
        for entry in result.trace:
            table.add_row(entry["name"], _shown(entry["value"]), entry["unit"])
        console.print(table)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= _COUNTS else f"{value:.3g}"
