"""What peers share: the same data as ours, and the same count of what they did."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.optimizer import lr_factor
from ghostvis_mega.parallel.dispatch import ImageDispatch
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.train_bench.results import StepRecord
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.utils.errors import TrainingError
from ghostvis_mega.utils.timing import SectionTimer


class PeerFeed(Feed):
    """A feed whose ranks decode what their own rows show: peers send no pictures around."""

    def own_images(self, dispatch: ImageDispatch, wanted: list[list[int]]) -> Sequence[int]:
        """The pictures of this rank's replica, ascending."""
        return sorted(set(wanted[self.groups.place.data]))


@dataclass(frozen=True)
class PeerStep:
    """One rank's part of a step."""

    step: int
    micro_batches: Sequence[MicroBatch]
    used: Sequence[int]
    """Positions of the longest row of each micro-batch."""
    pictures: dict[int, torch.Tensor]
    """uint8 [3, h, w] by image id, on the CPU."""
    loss_scale: float
    """What makes a sum over a micro-batch's tokens part of the mean over the global batch's, after
    the average over data parallelism."""


class PeerTrainer(ABC):
    """A peer: its data path, clock and counts; subclasses build and train.

    Args:
        run: Settings; without packing.
        groups: Of this rank.
        device: Of this rank.
    """

    def __init__(self, run: RunConfig, groups: Groups, *, device: torch.device):
        self.run, self.groups, self.device = run, groups, device
        self.feed = PeerFeed(run, groups, Dataset.open(run.data.train))
        self.timer = SectionTimer(device)
        self.description: dict[str, str] = {}

    @abstractmethod
    def train(self, work: PeerStep) -> torch.Tensor:
        """Forward, backward and update; returns this rank's share of the mean loss times its
        data-parallel size, as `PeerStep.loss_scale` makes it."""

    def step(self, step: int) -> StepRecord:
        """Train on the batch of `step`.

        Raises:
            TrainingError: The data are damaged, or the loss is not finite.
        """
        began = time.perf_counter()
        batch, work = self.feed.get(step)
        data_s = time.perf_counter() - began
        if work.damage:
            raise TrainingError(
                f"step {step + 1} has damaged samples, which peers cannot leave out"
            )
        replica = batch.replicas[self.groups.place.data]
        # All pictures of the step are there at once.
        (window,) = work.windows
        ids = self.feed.own_images(
            window.dispatch,
            [[i for micro in r for row in micro for i in row.image_ids] for r in batch.replicas],
        )
        data_size = self.groups.degrees.data
        loss = self.train(
            PeerStep(
                step=step,
                micro_batches=work.micro_batches,
                used=[max(row.num_tokens for row in micro) for micro in replica],
                pictures=dict(zip(ids, window.pixels_N3hw, strict=True)) if ids else {},
                loss_scale=data_size / batch.trained_tokens,
            )
        )
        loss = loss.detach().float().clone()
        dist.all_reduce(loss, group=self.groups.data)
        flops = self.feed.flops(batch)
        record = StepRecord(
            loss=loss.item() / data_size,
            tokens=batch.num_tokens,
            trained_tokens=batch.trained_tokens,
            images=len(batch.image_ids),
            flops_llm=flops.llm.total,
            flops_vision=flops.vision.total,
            data_s=data_s,
            sections=self.timer.read(),
        )
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss of step {step + 1} is not finite")
        return record

    def learning_rate(self, step: int, module: str) -> float:
        """Of one module in one step, as ours has it."""
        factor = lr_factor(step, optim=self.run.optim, total_steps=self.run.train.steps)
        return factor * getattr(self.run.optim.lr, module)

    def close(self) -> None:
        """Stop reading ahead."""
        self.feed.close()
