"""Somebody's own run as a problem: her settings, and the first batches of her data."""

import torch

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.windows import own_pictures
from ghostvis_mega.perf.certify.lab import Case
from ghostvis_mega.perf.certify.own_settings import load_own
from ghostvis_mega.perf.certify.request import Entry, Request
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.utils.errors import ConfigError


class FeedStream:
    """The batches that a run itself would read."""

    key = "feed"

    def __init__(self) -> None:
        self._feed: tuple[RunConfig, Groups, Feed] | None = None

    def rows(
        self, run: RunConfig, groups: Groups, step: int
    ) -> tuple[list[MicroBatch], dict[int, torch.Tensor]]:
        single = run.model_copy(update={"batch": run.batch.model_copy(update={"micro_size": 1})})
        work = self.step_input(single, groups, step)
        pictures = own_pictures(work.windows, 0)
        return list(work.micro_batches), pictures

    def step_input(self, run: RunConfig, groups: Groups, step: int) -> StepInput:
        if self._feed is None or self._feed[0] != run or self._feed[1] is not groups:
            self._feed = (run, groups, Feed(run, groups, Dataset.open(run.data.train)))
        _, work = self._feed[2].get(step)
        if len(work.damage):
            # Which layout reads a damaged sample would decide what the others train on.
            raise ConfigError(
                [f"data.train={run.data.train}: step {step} reads a damaged sample or picture. "
                 "Repair the dataset first: python -m tools.preprocess verify --deep."]
            )  # fmt: skip
        return work


def own_cases(request: Request) -> dict[Entry, Case]:
    """The layouts of a request on a run's own data; all have the same problem."""
    stream = FeedStream()
    return {
        entry: Case(name=entry.name, run=load_own(request, entry), stream=stream, measured_eps=True)
        for entry in request.entries
    }
