"""The report page: every text is escaped, here or in the parts, and nothing outside is loaded."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary
from ghostvis_mega.train.report.cards import draw_previews
from ghostvis_mega.train.report.charts import draw_chart
from ghostvis_mega.train.report.curves import run_charts
from ghostvis_mega.train.report.tiles import draw_tiles
from ghostvis_mega.train.report.timing import draw_goodput, draw_timing
from ghostvis_mega.utils.format import si
from ghostvis_mega.utils.html import page as html_page
from ghostvis_mega.utils.html.page import section


@dataclass
class ReportData:
    """Everything the page shows. `summary` is None while the run goes on."""

    run: RunInfo
    steps: list[StepMetrics] = field(default_factory=list)
    previews: dict[int, list[Preview]] = field(default_factory=dict)
    summary: Summary | None = None
    account: Summary = field(default_factory=Summary)
    """Where the time went up to now: `goodput` and `goodput_seconds`, where they are known."""


def render_page(data: ReportData) -> str:
    """The whole page as one HTML text without any reference to another file."""
    sections = [
        _header(data),
        draw_tiles(data.run, data.steps, data.summary),
        section("Curves", _charts(data.steps)),
        section("Where the time of a step goes", draw_timing(data.steps)),
        section("Where the time of the run went", draw_goodput(data.account)),
        section("What the model answers", draw_previews(data.previews)),
        section("Settings", _tables(data.run.get("settings", {}))),
        section("Versions", _versions(data.run.get("versions", {}))),
        section("Determinism", _versions(data.run.get("determinism", {}))),
    ]
    return html_page.render_page(
        title=data.run.get("name", "run"),
        body="".join(sections),
        style=html_page.read_resource(__package__, "style.css"),
        script=html_page.read_resource(__package__, "hover.js"),
    )


def _charts(steps: list[StepMetrics]) -> str:
    if not steps:
        return ""
    return f'<div class="charts">{"".join(draw_chart(chart) for chart in run_charts(steps))}</div>'


def _header(data: ReportData) -> str:
    run = data.run
    facts = []
    if parameters := run.get("parameters"):
        parts = ", ".join(f"{name} {si(count)}" for name, count in parameters.items())
        facts.append(("Parameters", f"{si(sum(parameters.values()))} ({parts})"))
    for key, label in (("layout", "Layout"), ("device", "Device"), ("precision", "Precision")):
        if key in run:
            facts.append((label, str(run[key])))
    if "trained_parameters" in run:
        facts.insert(1, ("Trained", si(run["trained_parameters"])))
    cells = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in facts
    )
    status, css = _status(data)
    model = f'<span class="model">{html.escape(run["model"])}</span>' if "model" in run else ""
    return (
        '<header><p class="brand">GhostVis-Mega <span>training report</span></p>'
        f"<h1>{html.escape(run.get('name', 'run'))}{model}"
        f'<span class="status {css}">{html.escape(status)}</span></h1>'
        f'<dl class="facts">{cells}</dl></header>'
    )


def _status(data: ReportData) -> tuple[str, str]:
    done = data.steps[-1].step if data.steps else data.run.get("start_step", 0)
    total = data.run["total_steps"]
    if data.summary is None:
        return f"running: step {done} of {total}", "running"
    outcome = data.summary.get("status", "finished")
    return f"{outcome}: {done} of {total} steps", "ended" if outcome == "finished" else "stopped"


def _tables(groups: Mapping[str, Any]) -> str:
    """Small tables side by side, one a group; nested keys are joined with dots."""
    if not any(groups.values()):
        return ""
    loose = {key: value for key, value in groups.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in groups.items() if isinstance(value, dict)}
    tables = ([("", loose)] if loose else []) + list(nested.items())
    return f'<div class="tables">{"".join(_table(name, rows) for name, rows in tables)}</div>'


def _table(name: str, rows: Mapping[str, Any]) -> str:
    caption = f"<caption>{html.escape(name)}</caption>" if name else ""
    body = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(text)}</td></tr>"
        for key, text in _flat(rows)
    )
    return f"<table>{caption}<tbody>{body}</tbody></table>"


def _versions(versions: Mapping[str, str]) -> str:
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(version)}</dd></div>"
        for name, version in versions.items()
    )
    return f'<dl class="panel facts">{cells}</dl>' if cells else ""


def _flat(rows: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    result = []
    for key, value in rows.items():
        if isinstance(value, dict):
            result += _flat(value, f"{prefix}{key}.")
        else:
            result.append((f"{prefix}{key}", _setting_text(value)))
    return result


def _setting_text(value: Any) -> str:
    if value is None or value in ([], ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(_setting_text(entry) for entry in value)
    return str(value)
