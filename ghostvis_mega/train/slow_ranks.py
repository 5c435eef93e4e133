"""Naming a rank that is slow, and in what, but not one that has more to do.

In a synchronous step a slow rank makes all others wait, so every rank's step takes as long. What a
rank took for itself is a section's time less what it waited for others inside. That is compared
with the other ranks' after scaling by the work each had: pictures read, pictures encoded, positions
computed, pictures packed to be sent. A rank with more work may take more time in proportion; one
with less work is not expected to be faster, because much of a step is there whatever the batch
holds.

Of the times in a window the lower quartile counts: what else a machine does makes some steps late,
a slow rank is slow in all of them. Ranks tell each other theirs in the all-reduce that each step
makes anyway.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.config.schema import GuardsConfig
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.train.lines import LineFile

log = logging.getLogger(__name__)

LEDGER = "slow_ranks.jsonl"
SECTIONS = {"data": "data", "vision": "tower", "llm": "LLM", "exchange": "comm"}
"""Sections of a step by their names for people."""
MEASURED = 10
"""Steps at the end of a window that are measured, at most: timing each wait costs a little."""
_LEAST_SHARE = 0.05
"""Of a step's time: what a rank loses to less than this is not worth a name."""


@dataclass(frozen=True)
class SlowRank:
    """A verdict."""

    rank: int
    section: str
    """For people."""
    factor: float
    """Its time over what the others would have taken for its work."""


def work_of(work: StepInput, *, places: Sequence[Place], rank: int) -> dict[str, float]:
    """What a rank has to do in each section of a step, in units of its own.

    Args:
        work: Of this rank.
        places: Of every rank.
        rank: This one.
    """
    place = places[rank]
    dispatches = [window.dispatch for window in work.windows]
    own = sum(len(dispatch.encode[rank]) for dispatch in dispatches)
    wanted = sum(len(dispatch.wanted[place.data]) for dispatch in dispatches)
    positions = sum(micro.tokens_BS.numel() for micro in work.micro_batches)
    return {
        "data": 1 + own,
        "vision": 1 + own,
        "llm": 1 + positions,
        "exchange": 1 + own + (wanted if place.pipeline == 0 else 0),
    }


class SlowRanks:
    """Measures this rank, and judges all by what they tell.

    Args:
        settings: Window and factor.
        places: Of every rank.
        rank: Of this process; the first one writes `slow_ranks.jsonl`.
        folder: Of the run.
    """

    def __init__(self, settings: GuardsConfig, *, places: Sequence[Place], rank: int, folder: Path):
        self.window = settings.slow_rank_window if len(places) > 1 else 0
        self.factor, self.places = settings.slow_rank_factor, places
        self.rank, self._ledger = rank, LineFile(folder / LEDGER)
        self._steps: list[dict[str, tuple[float, float]]] = []

    def measures(self, step: int) -> bool:
        """Whether this step, counted from 0, is one to measure."""
        return self.window > 0 and step % self.window >= self.window - MEASURED

    def note(self, own_s: Mapping[str, float], work: Mapping[str, float]) -> None:
        """Remember a measured step: own seconds and work by section."""
        self._steps.append({name: (own_s.get(name, 0.0), work[name]) for name in SECTIONS})

    def tell(self, step: int) -> tuple[float, ...]:
        """What the others should know before this step; the same number of numbers on all."""
        if self.window == 0 or step % self.window or not self._steps:
            return ()
        told = []
        for name in SECTIONS:
            seconds = sorted(s[name][0] for s in self._steps)
            told += [seconds[len(seconds) // 4], statistics.median(s[name][1] for s in self._steps)]
        self._steps.clear()
        return tuple(told)

    def judge(self, told: Sequence[Sequence[float]], *, step: int) -> list[SlowRank]:
        """The slow ranks among all that told of a window before `step`; logged and written down."""
        if not told or not told[0]:
            return []
        found = find_slow(told, self.places, factor=self.factor)
        if self.rank == 0:
            for slow in found:
                log.warning(
                    "rank %d is slow in %s: %.1f times as long as others for its work, "
                    "steps %d to %d",
                    slow.rank, slow.section, slow.factor, step - self.window + 1, step,
                )  # fmt: skip
                row = {"rank": slow.rank, "section": slow.section, "factor": slow.factor}
                self._ledger.append({"step": step, **row})
        return found


def find_slow(
    told: Sequence[Sequence[float]], places: Sequence[Place], *, factor: float
) -> list[SlowRank]:
    """Ranks that take `factor` times as long as their peers, by section.

    Args:
        told: By rank, seconds and work of each of `SECTIONS`.
        places: Of every rank. Layers of a pipeline's stages differ, so the LLM's time is compared
            within a stage; a stage of one rank has no peer.
        factor: That makes a rank slow.
    """
    longest = max(sum(row[::2]) for row in told)
    found = []
    for index, (name, label) in enumerate(SECTIONS.items()):
        times = [row[2 * index] for row in told]
        works = [row[2 * index + 1] for row in told]
        for rank, place in enumerate(places):
            peers = [
                other
                for other, its in enumerate(places)
                if other != rank and (name != "llm" or its.pipeline == place.pipeline)
            ]
            if not peers:
                continue
            expected = statistics.median(
                times[peer] * max(1.0, works[rank] / works[peer]) for peer in peers
            )
            excess = times[rank] - expected
            if times[rank] > factor * expected and excess > _LEAST_SHARE * longest:
                ratio = times[rank] / expected if expected > 0 else float("inf")
                found.append(SlowRank(rank, label, ratio))
    return found
