"""One optimizer step over all ranks; `docs/architecture.md` draws it.

The order of collectives is the same on every rank and in every step, whatever the batch holds: a
rank without pictures, a stage without anything to train and a text-only batch take part like all
others.
"""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import Damage, MicroBatch
from ghostvis_mega.engine.build import Parts, build_parts
from ghostvis_mega.engine.finish import (
    fill_missing_gradients,
    not_finite,
    sum_sequence_parallel_gradients,
    sum_tied_gradients,
)
from ghostvis_mega.engine.memory import most_pictures
from ghostvis_mega.engine.optimizer import lr_factor
from ghostvis_mega.engine.pipeline import Picture, Work, run_training_schedule
from ghostvis_mega.engine.recompute import settle_recompute
from ghostvis_mega.engine.vision import VisionRunner
from ghostvis_mega.model.dropout import Draw
from ghostvis_mega.model.inputs import model_input
from ghostvis_mega.parallel.exchange import EmbeddingExchange
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.windows import PictureWindow
from ghostvis_mega.utils.timing import SectionTimer
from ghostvis_mega.utils.transfer import to_device


@dataclass(frozen=True)
class StepInput:
    """What one rank needs for one step."""

    micro_batches: Sequence[MicroBatch]
    """Of this rank's replica."""
    windows: Sequence[PictureWindow]
    """Their pictures, stretch by stretch; together as many micro-batches."""
    trained_tokens: float
    """Sum of the loss weights over the whole global batch."""
    damage: Damage = Damage()
    """What this rank could not read; all ranks must have agreed on it before the step."""
    step: int = 0
    """Counted from 0; decides what dropout drops."""
    told: tuple[float, ...] = ()
    """Numbers of this rank that all ranks learn with the step's result; on all ranks as many."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports, equal on all ranks."""

    loss: float
    """Mean over the trained tokens of the global batch."""
    grad_norm: float
    """Joint norm of everything that trains, before the clip."""
    skipped: bool
    """True when the step was left out: no weight changed, on any rank."""
    lr_factor: float
    cause: str = ""
    """Why it was left out: `REFUSED`, one of `NOT_FINITE`, or `UNKNOWN`."""
    ranks: tuple[int, ...] = ()
    """Where `cause` came up first; empty where no rank can be told."""
    told: tuple[tuple[float, ...], ...] = ()
    """`StepInput.told` by rank."""


NOT_FINITE = (
    "picture embeddings that are not finite",
    "a loss that is not finite",
    "LLM gradients that are not finite",
    "vision gradients that are not finite",
)
"""What a rank can find in its own part of a step; what comes first leads to what follows."""
UNKNOWN = "a sum over ranks that is not finite, though no rank's own part is"
REFUSED = "a loss that was refused"


class TrainEngine:
    """The model of this rank and the step that trains it.

    Args:
        run: Settings, already checked.
        groups: Of this rank.
        device: Of this rank.
        pictures: Most that a rank encodes at a time, for `train.recompute=auto`; None: unknown.
    """

    def __init__(
        self,
        run: RunConfig,
        groups: Groups,
        *,
        device: torch.device,
        pictures: int | None = None,
    ):
        if run.train.recompute == "auto":
            if pictures is None:
                pictures = most_pictures(run, world_size=groups.degrees.world_size)
            run = settle_recompute(run, groups, device=device, pictures=pictures)
        self.run, self.groups, self.device = run, groups, device
        self.parts: Parts = build_parts(run, groups, device=device)
        self.timer = SectionTimer(device)
        self._embeddings_not_finite = torch.zeros((), device=device)
        self.vision: VisionRunner | None = None
        if self.parts.encoder is not None:
            self.vision = VisionRunner(
                self.parts.encoder, run.tower, width=run.model.llm.hidden_size
            )

    @property
    def engines(self) -> list:
        """The ZeRO engines in the order in which every rank uses them."""
        return [e for e in (self.parts.llm_engine, self.parts.vision_engine) if e is not None]

    def close(self) -> None:
        """Let go of all memory, so that another layout fits into the same process."""
        self._close_engines()
        self.parts = Parts(chunks=[], encoder=None, llm_engine=None, vision_engine=None)
        self.vision = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _close_engines(self) -> None:
        # Its own function, so that no loop variable holds an engine while memory is collected.
        for engine in self.engines:
            engine.close()

    def step(
        self, batch: StepInput, *, step: int, accept: Callable[[float], bool] | None = None
    ) -> StepResult:
        """Train on one global batch.

        Args:
            batch: This rank's part.
            step: Counted from 0; sets the learning rate.
            accept: Whether to train on a batch with this loss, which is finite; must answer alike
                on all ranks. None: always.
        """
        loss_sum = self.accumulate(batch)
        return self.update(loss_sum, batch, step=step, accept=accept)

    def accumulate(self, batch: StepInput) -> torch.Tensor:
        """Forward, backward and the reductions, up to but without the update.

        Returns:
            This replica's loss sum on the last pipeline stage, 0 before it.
        """
        llm, vision = self.parts.llm_engine, self.parts.vision_engine
        self._embeddings_not_finite = torch.zeros((), device=self.device)
        sums, done = [], 0
        with ExitStack() as vision_reductions, ExitStack() as llm_reductions:
            for number, window in enumerate(batch.windows):
                micro_batches = batch.micro_batches[done : done + window.num_micro_batches]
                done += len(micro_batches)
                first, last = number == 0, done == len(batch.micro_batches)
                exchange = EmbeddingExchange(window.dispatch, self.groups, window.image_rows)
                pictures = self.image_embeddings(
                    exchange, window.pixels_N3hw, for_training=vision is not None
                )
                if first and llm is not None:
                    # Not before the pictures: outside of stages 1 and 2 it takes memory for all
                    # gradients.
                    llm_reductions.enter_context(llm.reduce_once())
                with self.timer.section("llm"):
                    sums.append(self.train_llm(batch, micro_batches, pictures))
                    if last and llm is not None:
                        self.finish_llm_gradients()
                if last:
                    llm_reductions.close()
                if first and vision is not None:
                    vision_reductions.enter_context(vision.reduce_once())
                if vision is not None:
                    self.vision_backward(exchange, pictures)
        return torch.stack(sums).sum()

    def train_llm(
        self,
        batch: StepInput,
        micro_batches: Sequence[MicroBatch],
        pictures: dict[int, Picture],
    ) -> torch.Tensor:
        """The LLM's forward and backward over some micro-batches of a step; returns their loss
        sum."""
        return run_training_schedule(
            self.parts.chunks,
            self.work(micro_batches, dropout=Draw.of(self.run, step=batch.step)),
            pictures,
            loss_scale=self.loss_scale(len(micro_batches), trained_tokens=batch.trained_tokens),
        )

    def image_embeddings(
        self, exchange: EmbeddingExchange, pixels_N3hw: torch.Tensor, *, for_training: bool
    ) -> dict[int, Picture]:
        """Encode this rank's pictures and fetch what it reads of the batch's, by image id."""
        if self.vision is None:
            return {}
        with self.timer.section("vision"):
            pixels_N3hw = to_device(pixels_N3hw, self.device)
            own_NTH = self.vision.encode(pixels_N3hw, for_training=for_training)
            found = not_finite([own_NTH], device=self.device)
            self._embeddings_not_finite = torch.maximum(self._embeddings_not_finite, found)
        with self.timer.section("exchange"):
            wanted = exchange.embeddings(own_NTH)
        pictures = {}
        for image, embedding in wanted.items():
            rows = exchange.rows_of(image)
            pictures[image] = Picture(
                embedding=embedding.clone().requires_grad_(for_training),
                rows=None if rows is None else torch.from_numpy(rows),
            )
        return pictures

    def work(
        self, micro_batches: Sequence[MicroBatch], *, dropout: Draw | None = None
    ) -> list[Work]:
        """Micro-batches on the device; `dropout` of a training step."""
        return [
            Work(
                inputs=model_input(
                    batch,
                    tokens_per_image=self.run.model.tokens_per_image,
                    device=self.device,
                    for_sdpa=self.parts.chunks[0].backend == "cpu",
                    context=self.groups.context_slice,
                    dropout=dropout,
                ),
                image_ids=tuple(slot.image_id for slot in batch.images),
            )
            for batch in micro_batches
        ]

    def loss_scale(self, num_micro_batches: int, *, trained_tokens: float) -> float:
        """Factor that makes the averages of schedule and DeepSpeed a mean over the global batch's
        trained tokens.

        The schedule divides by the number of micro-batches and DeepSpeed by the data-parallel size,
        whatever the micro-batches hold; the objective must not depend on either. DeepSpeed also
        divides by the context-parallel size, by which Megatron-Core multiplies the loss.

        Args:
            num_micro_batches: Of this call of the schedule.
            trained_tokens: Sum of the loss weights over the whole global batch.
        """
        return num_micro_batches * self.groups.degrees.data / trained_tokens

    def finish_llm_gradients(self) -> None:
        """Complete the LLM's local gradients: zeros for unused ones, sums over sequence and tied
        copies."""
        parameters = self.parts.llm_engine.trained
        fill_missing_gradients(parameters)
        sum_sequence_parallel_gradients(parameters, self.groups)
        tied = None
        if self.run.model.llm.tied_embeddings:
            for chunk in self.parts.chunks:
                if chunk.pre_process or chunk.post_process:
                    tied = chunk.output.weight
        sum_tied_gradients(tied, self.groups)

    def vision_backward(self, exchange: EmbeddingExchange, pictures: dict[int, Picture]) -> None:
        """Send the embeddings' gradients to the pictures' owners and run the encoder backward
        there."""
        gradients = {}
        for image, picture in pictures.items():
            leaf = picture.embedding
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients[image] = gradient.float()
        shape_TH = (self.run.model.tokens_per_image, self.run.model.llm.hidden_size)
        with self.timer.section("exchange"):
            own_NTH = exchange.gradients(gradients, shape_TH=shape_TH, device=self.device)
        with self.timer.section("vision"):
            self.vision.backward(own_NTH * self.vision_gradient_scale())

    def vision_gradient_scale(self) -> float:
        """DeepSpeed averages the encoder over the world; the loss was scaled for an average over
        the ranks that hold the same LLM weights."""
        return len(self.groups.places) / self.groups.data.size()

    def update(
        self,
        loss_sum: torch.Tensor,
        batch: StepInput,
        *,
        step: int,
        accept: Callable[[float], bool] | None = None,
    ) -> StepResult:
        """One norm over all engines, one decision, one clip, then every engine steps.

        A single all-reduce carries the squared norms, the loss, what each rank found not finite in
        its own part, and what it tells the others.
        """
        with self.timer.section("optimizer"):
            for engine in self.engines:
                engine.reduced()
            loss, norm, found, told = self._totals(loss_sum, batch)
            cause, ranks = "", ()
            if not math.isfinite(loss) or not math.isfinite(norm):
                cause, ranks = first_cause(found)
            elif accept is not None and not accept(loss):
                cause = REFUSED
            factor = lr_factor(step, optim=self.run.optim, total_steps=self.run.train.steps)
            limit = self.run.optim.clip_norm
            for engine in self.engines:
                if cause:
                    engine.discard()
                    continue
                engine.set_learning_rates(factor, self.run.optim)
                engine.update(min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0)
        return StepResult(
            loss=loss,
            grad_norm=norm,
            skipped=bool(cause),
            lr_factor=factor,
            cause=cause,
            ranks=ranks,
            told=told,
        )

    def _totals(
        self, loss_sum: torch.Tensor, batch: StepInput
    ) -> tuple[float, float, list[int], tuple[tuple[float, ...], ...]]:
        """Loss, norm, and by rank what it found (bits in the order of `NOT_FINITE`) and told."""
        groups = self.groups
        counts = groups.is_last_stage and groups.place.tensor == 0
        loss_sum = loss_sum.float()
        parts = [loss_sum if counts else torch.zeros_like(loss_sum)]
        parts += [engine.square_sum() for engine in self.engines]
        llm, vision = (
            torch.zeros_like(loss_sum) if engine is None else engine.own_not_finite
            for engine in (self.parts.llm_engine, self.parts.vision_engine)
        )
        bits = (self._embeddings_not_finite, (~torch.isfinite(loss_sum)).float(), llm, vision)
        rows = loss_sum.new_zeros(len(groups.places), 1 + len(batch.told))
        rows[groups.rank, 0] = torch.stack([bit * 2**n for n, bit in enumerate(bits)]).sum()
        if batch.told:
            rows[groups.rank, 1:] = rows.new_tensor(batch.told)
        totals = torch.cat([torch.stack(parts), rows.flatten()])
        dist.all_reduce(totals, group=groups.world)
        numbers = totals.double().tolist()
        loss, squares = numbers[0] / batch.trained_tokens, numbers[1 : len(parts)]
        width, rest = rows.shape[1], numbers[len(parts) :]
        by_rank = [tuple(rest[at : at + width]) for at in range(0, len(rest), width)]
        found, told = [int(row[0]) for row in by_rank], tuple(row[1:] for row in by_rank)
        return loss, sum(squares) ** 0.5, found, told


def first_cause(found: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """What is not finite and on which ranks it began.

    Args:
        found: By rank, bits in the order of `NOT_FINITE`.
    """
    for bit, name in enumerate(NOT_FINITE):
        if ranks := tuple(rank for rank, bits in enumerate(found) if bits >> bit & 1):
            return name, ranks
    return UNKNOWN, ()
