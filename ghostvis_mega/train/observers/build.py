"""The observers that a configuration asks for, as one."""

import logging
from collections.abc import Callable, Sequence

from ghostvis_mega.config.schema import LogConfig
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Observer, Preview, RunInfo, Summary
from ghostvis_mega.train.observers.console import ConsoleLine
from ghostvis_mega.train.observers.jsonlines import JsonLines
from ghostvis_mega.train.observers.tensorboard import TensorBoard
from ghostvis_mega.train.observers.wandb import Wandb
from ghostvis_mega.train.report import HtmlReport

log = logging.getLogger(__name__)


class Observers:
    """Passes everything on to each observer, in order; without any it does nothing.

    One that cannot write costs no training: it is a warning, once. One that could not even begin
    is left out from then on.
    """

    def __init__(self, members: Sequence[Observer] = ()):
        self.members = tuple(members)
        self._failed: set[str] = set()

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for member in self.members:
            try:
                tell(member)
            except OSError as error:
                if (name := type(member).__name__) not in self._failed:
                    self._failed.add(name)
                    log.warning("%s cannot write: %s. Training goes on", name, error)

    def on_start(self, run: RunInfo) -> None:
        """Tell every observer."""
        begun = []
        for member in self.members:
            try:
                member.on_start(run)
            except OSError as error:
                name = type(member).__name__
                log.warning("%s cannot begin: %s. Training goes on without it", name, error)
            else:
                begun.append(member)
        self.members = tuple(begun)

    def on_step(self, m: StepMetrics) -> None:
        """Tell every observer."""
        self._tell(lambda member: member.on_step(m))

    def on_preview(self, step: int, previews: list[Preview]) -> None:
        """Tell every observer."""
        self._tell(lambda member: member.on_preview(step, previews))

    def on_end(self, summary: Summary) -> None:
        """Tell every observer."""
        self._tell(lambda member: member.on_end(summary))


def make_observers(
    log: LogConfig, *, rank: int, account: Callable[[], Summary] | None = None
) -> Observers:
    """Observers of this process: those of the settings on rank 0, none elsewhere.

    Args:
        log: Settings.
        rank: Of this process.
        account: Of the run's time up to now, for the report.

    Raises:
        MissingDependencyError: an optional package that the settings ask for is not installed.
    """
    if rank != 0:
        return Observers()
    metrics = log.output / "metrics.jsonl"
    members: list[Observer] = [
        ConsoleLine(every=log.every),
        JsonLines(metrics),
        HtmlReport(log.output / "report" / "index.html", history=metrics, account=account),
    ]
    if log.tensorboard:
        members.append(TensorBoard(log.output / "tensorboard"))
    if log.wandb != "disabled":
        members.append(Wandb(log.output, mode=log.wandb))
    return Observers(members)
