"""The observer that keeps what it is told and writes the report page."""

import time
from collections.abc import Callable
from pathlib import Path

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary
from ghostvis_mega.train.observers.jsonlines import read_metrics
from ghostvis_mega.train.report.history import PreviewHistory
from ghostvis_mega.train.report.page import ReportData, render_page
from ghostvis_mega.utils.files import atomic_write

COST_LIMIT = 50
"""The page is not rewritten before this many times the time that writing it took has passed."""


class HtmlReport:
    """Writes one self-contained HTML file every `every` steps, at previews and at the end.

    Previews are also kept in the folder `previews` beside it, from which a resumed run reads them.

    Args:
        path: the page, such as `OUTPUT/report/index.html`.
        every: steps between two writes; more when the run is so long that writing takes time.
        history: metrics file of the run; a resumed run's curves begin with what it holds.
        account: gives `goodput` and `goodput_seconds` up to now.
    """

    def __init__(
        self,
        path: Path,
        *,
        every: int = 50,
        history: Path | None = None,
        account: Callable[[], Summary] | None = None,
    ):
        self._path = path
        self._every = every
        self._history = history
        self._account = account
        self._previews = PreviewHistory(path.parent / "previews")
        self._data = ReportData(run={"total_steps": 0})
        self._not_before_s = 0.0

    def on_start(self, run: RunInfo) -> None:
        """Begin the page, with the earlier steps and previews of a resumed run.

        Raises:
            DataError: a file that holds them is damaged.
        """
        start = run.get("start_step", 0)
        self._data = ReportData(run=run)
        if start and self._history is not None and self._history.exists():
            self._data.steps = read_metrics(self._history, last_step=start)
        self._data.previews = self._previews.begin(last_step=start)

    def on_step(self, m: StepMetrics) -> None:
        """Keep the step; write the page when it is due."""
        self._data.steps.append(m)
        if m.step % self._every == 0 and time.perf_counter() >= self._not_before_s:
            self._write()

    def on_preview(self, step: int, previews: list[Preview]) -> None:
        """Keep the previews and write the page."""
        self._data.previews[step] = list(previews)
        self._previews.keep(step, previews)
        self._write()

    def on_end(self, summary: Summary) -> None:
        """Write the final page."""
        self._data.summary = summary
        self._write()

    def _write(self) -> None:
        began_s = time.perf_counter()
        if self._account is not None:
            self._data.account = self._account()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self._path, render_page(self._data).encode("utf-8"))
        ended_s = time.perf_counter()
        self._not_before_s = ended_s + COST_LIMIT * (ended_s - began_s)
