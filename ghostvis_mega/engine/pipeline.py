"""Megatron-Core's schedules over the raw LLM chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from ghostvis_mega.model.inputs import ModelInput
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.utils.transfer import to_device


@dataclass(frozen=True)
class Picture:
    """What a rank of the first stage holds of one picture's embedding."""

    embedding: torch.Tensor
    """[rows, H]; a leaf in training, whose `.grad` adds up."""
    rows: torch.Tensor | None
    """int64, on the CPU: which of the picture's rows these are, ascending; None: all."""


@dataclass(frozen=True)
class Work:
    """One micro-batch on its way through the chunks of a stage."""

    inputs: ModelInput
    image_ids: tuple[int, ...]
    """Pictures in slot order."""


def run_training_schedule(
    chunks: list[LLMChunk],
    work: Sequence[Work],
    pictures: dict[int, Picture],
    *,
    loss_scale: float,
) -> torch.Tensor:
    """Forward and backward of all micro-batches: no pipeline, 1F1B or interleaved, as the layout
    says.

    Args:
        chunks: This stage's.
        work: Micro-batches, the same number on every stage; rows and lengths equal.
        pictures: By image id, on the first stage.
        loss_scale: Factor on each micro-batch's loss sum, beside the schedule's own 1 / number of
            micro-batches.

    Returns:
        Sum of the unscaled losses over this rank's rows of its replica's micro-batches; 0 before
        the last stage.
    """

    def loss(
        inputs: ModelInput, chunk: LLMChunk, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # What the schedule makes of it: it divides by the number of micro-batches, and multiplies
        # by the context-parallel size.
        grad = loss_scale * chunk.config.context_parallel_size / len(work)
        total = chunk.loss_sum(hidden, inputs, expected_grad=grad)
        # The schedule divides its loss in place, so what is reported must be a copy.
        return total * loss_scale, total.detach().clone()

    def forward_step(items: Iterator[Work], chunk: LLMChunk):
        item = next(items)
        hidden = chunk(item.inputs, gather_vision(item, pictures) if chunk.pre_process else None)
        return hidden, partial(loss, item.inputs, chunk)

    losses = _run(chunks, work, forward_step, forward_only=False)
    device = work[0].inputs.tokens_BS.device
    return torch.stack(losses).sum() if losses else torch.zeros((), device=device)


def run_scoring_schedule(
    chunks: list[LLMChunk],
    work: Sequence[Work],
    pictures: dict[int, Picture],
    rows: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Forward only: this tensor rank's logits at chosen positions of each micro-batch.

    Args:
        chunks: This stage's.
        work: Micro-batches.
        pictures: By image id, on the first stage.
        rows: int64 flat S*B positions of this rank's rows for each micro-batch.

    Returns:
        [rows, vocabulary part] for each micro-batch on the last stage, else an empty list.
    """
    waiting = {id(item): index for item, index in zip(work, rows, strict=True)}

    def score(
        item: Work, chunk: LLMChunk, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.new_zeros(()), chunk.logits(hidden, waiting[id(item)])

    def forward_step(items: Iterator[Work], chunk: LLMChunk):
        item = next(items)
        hidden = chunk(item.inputs, gather_vision(item, pictures) if chunk.pre_process else None)
        return hidden, partial(score, item, chunk)

    with torch.no_grad():
        return _run(chunks, work, forward_step, forward_only=True)


def gather_vision(item: Work, pictures: dict[int, Picture]) -> torch.Tensor | None:
    """Embeddings that a micro-batch's slots show on this rank, slot after slot: [rows, H]; None
    without any."""
    parts, places, start, picked = [], [], 0, False
    for image, rows in zip(item.image_ids, item.inputs.slot_rows, strict=True):
        if rows is not None and len(rows) == 0:
            continue
        picture = pictures[image]
        parts.append(picture.embedding)
        if rows is not None and picture.rows is not None:
            # A slot may show less than what this rank holds, where the picture has another slot.
            picked = picked or len(rows) < len(picture.rows)
            places.append(start + torch.searchsorted(picture.rows, rows))
            start += len(picture.rows)
    if not parts:
        return None
    held_nH = torch.cat(parts)
    return held_nH[to_device(torch.cat(places), held_nH.device)] if picked else held_nH


def _run(
    chunks: list[LLMChunk], work: Sequence[Work], forward_step, *, forward_only: bool
) -> list[torch.Tensor]:
    num_rows, length = work[0].inputs.positions_BW.shape
    # The interleaved schedule runs each chunk over all micro-batches: one iterator each.
    iterators = [iter(work) for _ in chunks]
    several = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=len(work),
        seq_length=length,
        micro_batch_size=num_rows,
        forward_only=forward_only,
    )
