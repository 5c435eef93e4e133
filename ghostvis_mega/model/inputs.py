"""One micro-batch on its device, as the model reads it."""

from dataclasses import dataclass

import numpy as np
import torch

from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.model.attention import SegmentedParams, segmented_params
from ghostvis_mega.model.context import WHOLE, ContextSlice, row_owners
from ghostvis_mega.model.dropout import Draw, position_keys
from ghostvis_mega.utils.transfer import to_device


@dataclass(frozen=True)
class ModelInput:
    """A micro-batch as tensors of the model's device.

    S counts the rows of this context-parallel rank, W all rows of the sequence; without context
    parallelism the two are the same.
    """

    tokens_BS: torch.Tensor
    """int64 token ids; image positions hold the image token."""
    rows_S: torch.Tensor
    """int64: which rows of the sequence these are, ascending."""
    positions_BW: torch.Tensor
    """int64, from 0 in each sample, of the whole sequence: Megatron-Core's own packed rotary
    embedding cuts its table itself."""
    packed: SegmentedParams | None
    trained_rows: torch.Tensor
    """int64 [R]: flat S*B positions whose next token is trained, ascending."""
    labels_R: torch.Tensor
    """int64 [R]: the tokens to predict there."""
    weights_R: torch.Tensor
    """float32 [R]."""
    image_rows: torch.Tensor
    """int64: flat S*B positions that images fill, slot after slot."""
    slot_rows: tuple[torch.Tensor | None, ...]
    """On the CPU: which rows of its image each slot shows here, ascending; None: all of them."""
    shows_images: bool
    """Whether the sequence shows images, on this or another context-parallel rank."""
    dropout_keys_SB: torch.Tensor | None = None
    """int64; None where nothing is dropped."""


def segment_lengths(batch: MicroBatch) -> np.ndarray:
    """Lengths of the stretches that attend within themselves; an unpacked row is one."""
    if batch.cu_seqlens is None:
        return np.array([batch.tokens_BS.shape[1]])
    return np.diff(batch.cu_seqlens.numpy())


def model_input(
    batch: MicroBatch,
    *,
    tokens_per_image: int,
    device: torch.device,
    for_sdpa: bool,
    context: ContextSlice = WHOLE,
    dropout: Draw | None = None,
) -> ModelInput:
    """Move a micro-batch to `device`, cut to one context-parallel rank, and derive the index
    tables.

    Labels and weights belong to positions, so cutting needs nothing from a neighbour.

    Args:
        batch: From the data package, on the CPU; the same on all context-parallel ranks.
        tokens_per_image: Positions that each image slot takes.
        device: The model's.
        for_sdpa: Whether attention is `SDPACoreAttention` (needs its tables), not Transformer
            Engine's.
        context: The rank to cut for.
        dropout: Of the step, in training with dropout.

    Raises:
        ValueError: A segment does not divide over the context-parallel ranks.
    """
    lengths = segment_lengths(batch)

    def move(x: torch.Tensor) -> torch.Tensor:
        return to_device(x, device)

    packed = None
    if batch.cu_seqlens is not None:
        packed = segmented_params(
            move(batch.cu_seqlens),
            max_seqlen=batch.max_seqlen,
            for_sdpa=for_sdpa,
            context=context,
        )

    rows_S = torch.arange(batch.tokens_BS.shape[1])
    if context.size > 1:
        rows_S = torch.from_numpy(context.rows(lengths))
    tokens_BS, labels_BS, weights_BS = (
        x if context.size == 1 else x[:, rows_S]
        for x in (batch.tokens_BS, batch.labels_BS, batch.weights_BS)
    )
    # Megatron's activations are [S, B, H], so flat positions count s * B + b.
    weights = weights_BS.t().reshape(-1)
    trained_rows = weights.nonzero().flatten()
    image_rows, slot_rows = _image_rows(batch, lengths, tokens_per_image, context)
    keys_SB = None
    if dropout is not None:
        # A packed row is named by its first sample.
        samples = batch.sample_ids if batch.cu_seqlens is None else batch.sample_ids[:1]
        assert len(samples) == len(tokens_BS), "each row needs a sample that names it"
        keys_SB = position_keys(dropout, row_samples=samples, rows_S=rows_S)
    return ModelInput(
        tokens_BS=move(tokens_BS),
        rows_S=move(rows_S),
        positions_BW=move(batch.positions_BS),
        packed=packed,
        trained_rows=move(trained_rows),
        labels_R=move(labels_BS.t().reshape(-1)[trained_rows]),
        weights_R=move(weights[trained_rows]),
        image_rows=move(image_rows),
        slot_rows=tuple(slot_rows),
        shows_images=bool(batch.images),
        dropout_keys_SB=None if keys_SB is None else move(keys_SB),
    )


def _image_rows(
    batch: MicroBatch, lengths: np.ndarray, tokens_per_image: int, context: ContextSlice
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """`ModelInput.image_rows` and `ModelInput.slot_rows`, on the CPU."""
    num_rows = batch.tokens_BS.shape[0]
    starts = torch.tensor([slot.start for slot in batch.images], dtype=torch.int64)
    in_row = torch.tensor([slot.row for slot in batch.images], dtype=torch.int64)
    # [slots, tokens_per_image]: places in the sequence
    places = starts[:, None] + torch.arange(tokens_per_image)
    if context.size == 1:
        return (places * num_rows + in_row[:, None]).flatten(), [None] * len(batch.images)
    mine = torch.from_numpy(row_owners(lengths, size=context.size) == context.rank)
    here = mine[places]
    local = mine.cumsum(0)[places] - 1
    return (
        (local * num_rows + in_row[:, None])[here],
        [slot.nonzero().flatten() for slot in here],
    )
