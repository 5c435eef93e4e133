"""Verdicts on measurements, and the tables they are shown in. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ghostvis_mega.perf.certify.bars import (
    GRADIENT_BAR,
    LOSS_BAR,
    NORM_BAR,
    UPDATE_BAR,
    WEIGHT_BAR,
    noise_bars,
)
from ghostvis_mega.perf.certify.faults import Fault, finding
from ghostvis_mega.utils.figures import Figure, at_most, measured

Verdict = Literal["fine", "red", "not run"]


@dataclass(frozen=True)
class Outcome:
    """What became of one layout or fault: figures, or the reason why there are none."""

    name: str
    row: dict[str, Any] | None = None
    """Of `lab.Lab.measure`."""
    failure: str | None = None
    """It raised, hung or was refused."""
    not_run: str | None = None
    """It was not tried."""
    fault: Fault | None = None
    """What was planted."""

    @property
    def verdict(self) -> Verdict:
        """Fine only if it ran and every figure with a bar keeps it (a fault: breaks it)."""
        if self.not_run is not None:
            return "not run"
        if self.row is None:
            return "red"
        return "fine" if all(figure["ok"] is not False for figure in self.figures()) else "red"

    def figures(self) -> list[Figure]:
        """Rows of name, value, unit, bar and ok."""
        if self.row is None:
            why, ok = (self.not_run, None) if self.failure is None else (self.failure, False)
            label = "not run" if self.failure is None else "failed"
            return [measured(f"{self.name}: {label}, {why}", None, ok=ok)]
        if self.fault is not None:
            found = finding(self.fault, self.row)
            name = f"fault, {self.name}: {found.where}"
            return [measured(name, found.value, found.unit, bar=found.bar, ok=found.seen)]
        figures = _fp32_figures if self.row.get("noise") is None else _noise_figures
        return figures(self.name, self.row)


def _fp32_figures(name: str, row: dict[str, Any]) -> list[Figure]:
    entries = (
        (f"worst gradient, {row['gradient_name']}", row["gradient_error"], GRADIENT_BAR),
        ("loss", row["loss_error"], LOSS_BAR),
        (f"worst weight, {row['weight_name']}", row["weight_error"], WEIGHT_BAR),
        (f"worst update, {row['update_name']}", row["update_error"], UPDATE_BAR),
        ("joint norm", row["norm_error"], NORM_BAR),
    )
    units = ("relative L2", "relative", "relative L2", "relative L2", "relative")
    figures = [
        at_most(f"{name}: {what}", value, unit, bar)
        for (what, value, bar), unit in zip(entries, units, strict=True)
    ]
    return [*figures, measured(f"{name}: time", row["seconds"], "s")]


def _noise_figures(name: str, row: dict[str, Any]) -> list[Figure]:
    noise = row["noise"]
    # Without a finite noise nothing can be said, and that is not fine; max() would hide a NaN.
    sound = all(math.isfinite(value) for value in noise.values())
    bars, caps = noise_bars(noise), row["noise_caps"]
    entries = (
        ("joint gradient", "joint_error", "relative L2"),
        (f"worst gradient over its noise, {row['ratio_name']}", "ratio", "times"),
        ("loss", "loss_error", "relative"),
        (f"worst weight, {row['weight_name']}", "weight_error", "relative L2"),
        (f"worst update over its noise, {row['update_ratio_name']}", "update_ratio", "times"),
        ("joint norm", "norm_error", "relative"),
    )
    figures = [
        measured(
            f"{name}: {what}", row[key], unit, bar=bars[key], ok=sound and row[key] <= bars[key]
        )
        for what, key, unit in entries
    ]
    of_one = {"joint gradient": "joint_error", "weight": "weight_error", "update": "update_error"}
    of_one |= {"loss": "loss_error", "joint norm": "norm_error"}
    of_one |= {f"worst gradient, {row['noise_name']}": "gradient_error"}
    figures += [
        at_most(f"{name}: one BF16 process, {what}", noise[key], "relative", caps.get(key))
        for what, key in of_one.items()
    ]
    return [*figures, measured(f"{name}: time", row["seconds"], "s")]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 when everything that ran is fine and something ran, else 1."""
    verdicts = [outcome.verdict for outcome in outcomes]
    return 0 if "red" not in verdicts and "fine" in verdicts else 1


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: how many layouts are fine, red, not run; how many faults were seen."""
    parts = []
    for planted, noun, good, bad in (
        (False, "layouts", "fine", "NOT fine"),
        (True, "planted faults", "seen", "NOT seen"),
    ):
        chosen = [o.verdict for o in outcomes if (o.fault is not None) == planted]
        if not chosen:
            continue
        text = f"{chosen.count('fine')} of {len(chosen)} {noun} {good}"
        text += f", {chosen.count('red')} {bad}" if "red" in chosen else ""
        text += f", {chosen.count('not run')} not run" if "not run" in chosen else ""
        parts.append(text)
    return "; ".join(parts)


def cells(outcome: Outcome) -> list[str]:
    """One line of the table, as `COLUMNS` names it."""
    row, fault = outcome.row, outcome.fault
    name = f"fault: {outcome.name}" if fault is not None else outcome.name
    words = {"fine": "seen", "red": "NOT SEEN"} if fault is not None else {"red": "RED"}
    verdict = words.get(outcome.verdict, outcome.verdict)
    if row is None:
        return [name, *[""] * (len(COLUMNS) - 2), verdict]
    if fault is not None:
        found = finding(fault, row)
        gradient, where = f"{row['gradient_error']:.1e}", f"{found.where} ({found.value:.1e})"
    elif row.get("noise") is not None:
        noise = row["noise"]["joint_error"]
        gradient = f"{row['joint_error']:.2e} ({row['joint_error'] / noise:.2f} x noise)"
        where = f"{row['ratio_name']} ({row['ratio']:.1f} x)"
    else:
        gradient, where = f"{row['gradient_error']:.1e}", row["gradient_name"]
    keys = ("loss_error", "weight_error", "update_error", "norm_error")
    numbers = [f"{row[key]:.1e}" for key in keys]
    return [name, gradient, where, *numbers, f"{row['seconds']:.1f}", verdict]


def brief(outcome: Outcome) -> str:
    """What came out, in one line."""
    name, gradient, where, *_, seconds, verdict = cells(outcome)
    return f"{name}: {verdict}, gradient {gradient}, worst {where}, {seconds} s"


COLUMNS = ("layout", "gradient", "worst parameter", "loss", "weights", "update", "norm", "s", "")


def show(outcomes: Sequence[Outcome], *, title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        table.add_row(*cells(outcome))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    for reason in reasons(outcomes):
        console.print(reason, markup=False)
    console.print(summary(outcomes), markup=False)


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each layout without figures."""
    return [
        f"{outcome.name}: {outcome.failure or f'not run, {outcome.not_run}'}."
        for outcome in outcomes
        if outcome.row is None
    ]


def markdown(outcomes: Sequence[Outcome], *, command: str) -> str:
    """The table for documentation, with the command that makes it; no times, which would change."""
    shown = [column or "verdict" for column in COLUMNS if column != "s"]
    lines = [
        f"Made by `{command}`.",
        "",
        f"{summary(outcomes)}.",
        "",
        f"| {' | '.join(shown)} |",
        f"|{'---|' * len(shown)}",
    ]
    for outcome in outcomes:
        parts = cells(outcome)
        del parts[COLUMNS.index("s")]
        lines.append(f"| {' | '.join(parts)} |")
    lines += ["", *(f"* {reason}" for reason in reasons(outcomes))] if reasons(outcomes) else []
    return "\n".join(lines) + "\n"
