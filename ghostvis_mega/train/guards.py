"""Steps that would harm a run are left out, on all ranks alike, and what they held is written down.

All ranks judge by the same numbers, those of the step's one all-reduce, so they need not ask each
other. A step with a loss or gradient that is not finite is never taken. A loss spike is a matter
of settings: taken, left out, or answered by going back to the last checkpoint and leaving out what
came since. A run that leaves out several steps in a row stops.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import GlobalBatch
from ghostvis_mega.data.corpus import Corpus
from ghostvis_mega.engine.step import NOT_FINITE, REFUSED, StepResult
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.windows import PictureWindow, images_of
from ghostvis_mega.train.lines import LineFile
from ghostvis_mega.train.spikes import SpikeDetector

log = logging.getLogger(__name__)

LEDGER = "skipped_steps.jsonl"
_OF_PICTURES = (NOT_FINITE[0], NOT_FINITE[3])
"""Causes that arise in what a rank encodes; the others in what its replica reads."""
_SHOWN = 12


class Action(Enum):
    """What the loop does after a step."""

    GO_ON = "go on"
    ROLL_BACK = "roll back"
    STOP = "stop"


@dataclass(frozen=True)
class Suspects:
    """What a step that was left out had read where its trouble began."""

    samples: list[int]
    images: list[int]

    @classmethod
    def of(
        cls,
        result: StepResult,
        batch: GlobalBatch,
        windows: Sequence[PictureWindow],
        places: Sequence[Place],
        corpus: Corpus,
    ) -> "Suspects":
        """Samples of the replicas, or pictures of the ranks and the samples that show them; those
        of the whole batch where no rank is known."""
        ranks = result.ranks or range(len(places))
        if result.cause in _OF_PICTURES:
            images = {image for rank in ranks for image in images_of(windows, rank)}
            samples = {
                sample
                for row in batch.sequences
                for sample in row.sample_ids
                if not images.isdisjoint(corpus.images_of(sample))
            }
            return cls(sorted(samples), sorted(images))
        rows = [
            row
            for replica in {places[rank].data for rank in ranks}
            for micro in batch.replicas[replica]
            for row in micro
        ]
        samples = {sample for row in rows for sample in row.sample_ids}
        return cls(sorted(samples), sorted({image for row in rows for image in row.image_ids}))


class Guards:
    """Judges every step of a run.

    Args:
        run: Settings.
        places: Of every rank.
        rank: Of this process; the first one writes `skipped_steps.jsonl`.
    """

    def __init__(self, run: RunConfig, *, places: Sequence[Place], rank: int):
        self.run, self.places, self.rank = run, places, rank
        settings = run.guards
        self.spikes = SpikeDetector(window=settings.spike_window, sigma=settings.spike_sigma)
        self.skipped_in_a_row = 0
        self._changes = {change.step for change in run.data.blend_changes}
        self._step = 0
        self._ledger = LineFile(run.log.output / LEDGER)

    def before(self, step: int) -> None:
        """Told of each step, counted from 0, before it begins."""
        self._step = step
        if step in self._changes:
            self.spikes.forget()

    def accept(self, loss: float) -> bool:
        """Whether to train on a batch with this finite loss."""
        return self.run.guards.spike == "none" or not self.spikes.is_spike(loss)

    def after(
        self,
        step: int,
        result: StepResult,
        batch: GlobalBatch,
        windows: Sequence[PictureWindow],
        corpus: Corpus,
    ) -> Action:
        """What to do after a step, counted from 0; writes down what was left out."""
        if not result.skipped:
            self.skipped_in_a_row = 0
            self.spikes.take(result.loss)
            return Action.GO_ON
        self.skipped_in_a_row += 1
        suspects = Suspects.of(result, batch, windows, self.places, corpus)
        self._write(step + 1, result, suspects)
        if self.skipped_in_a_row >= self.run.guards.max_skipped:
            return Action.STOP
        spike = result.cause == REFUSED
        return Action.ROLL_BACK if spike and self.run.guards.spike == "rollback" else Action.GO_ON

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        return {"losses": self.spikes.losses, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, state: Any) -> None:
        """Go on with the state of a checkpoint; one without a state of ours begins anew."""
        if isinstance(state, dict):
            self.spikes.restore(state["losses"])
            self.skipped_in_a_row = int(state["skipped_in_a_row"])

    def go_back(self, state: Any, *, steps: int) -> None:
        """Forget the losses since the checkpoint after `steps` steps, whose state this is; what was
        left out in a row still counts, so that going back again and again comes to an end.

        The run goes on behind the step it is at: where the data have changed since, the losses of
        the checkpoint are those of other data.
        """
        if not isinstance(state, dict) or any(steps <= at <= self._step for at in self._changes):
            self.spikes.forget()
        else:
            self.spikes.restore(state["losses"])

    def _write(self, done: int, result: StepResult, suspects: Suspects) -> None:
        if self.rank != 0:
            return
        score = self.spikes.score(result.loss) if result.cause == REFUSED else None
        where = "all ranks" if not result.ranks else f"rank {', '.join(map(str, result.ranks))}"
        log.warning(
            "step %d is left out: %s%s on %s, samples %s",
            done,
            result.cause,
            "" if score is None else f" ({result.loss:.4g}, {score:.1f} sigma)",
            where,
            _shortened(suspects.samples),
        )
        row = {
            "step": done,
            "cause": result.cause,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "sigma": score,
            "ranks": list(result.ranks),
            "samples": suspects.samples,
            "images": suspects.images,
        }
        self._ledger.append(row)


def _shortened(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:_SHOWN]))
    rest = len(numbers) - _SHOWN
    return f"{text} and {rest} more" if rest > 0 else text or "none"
