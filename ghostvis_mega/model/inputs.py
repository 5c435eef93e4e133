"""One micro-batch on its device, as the model reads it."""

from dataclasses import dataclass

import torch

from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.model.attention import SegmentedParams, segmented_params


@dataclass(frozen=True)
class ModelInput:
    """A micro-batch as tensors of the model's device."""

    tokens_BS: torch.Tensor
    """int64 token ids; image positions hold the image token."""
    positions_BS: torch.Tensor
    """int64, from 0 in each sample."""
    packed: SegmentedParams | None
    trained_rows: torch.Tensor
    """int64 [R]: flat S*B positions whose next token is trained, ascending."""
    labels_R: torch.Tensor
    """int64 [R]: the tokens to predict there."""
    weights_R: torch.Tensor
    """float32 [R]."""
    image_rows: torch.Tensor
    """int64: flat S*B positions that images fill, slot after slot."""


def model_input(
    batch: MicroBatch, *, tokens_per_image: int, device: torch.device, for_sdpa: bool
) -> ModelInput:
    """Move a micro-batch to `device` and derive the index tables.

    Args:
        batch: From the data package, on the CPU.
        tokens_per_image: Positions that each image slot takes.
        device: The model's.
        for_sdpa: Whether attention is `SDPACoreAttention` (needs its tables), not Transformer
            Engine's.
    """
    num_rows, length = batch.tokens_BS.shape
    # Megatron's activations are [S, B, H], so flat positions count s * B + b.
    weights = batch.weights_BS.t().reshape(-1)
    trained_rows = weights.nonzero().flatten()
    labels = batch.labels_BS.t().reshape(-1)[trained_rows]
    starts = torch.tensor(
        [slot.start * num_rows + slot.row for slot in batch.images], dtype=torch.int64
    )
    steps = torch.arange(tokens_per_image) * num_rows
    packed = None
    if batch.cu_seqlens is not None:
        packed = segmented_params(
            batch.cu_seqlens.to(device), max_seqlen=batch.max_seqlen, for_sdpa=for_sdpa
        )

    def move(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    assert batch.positions_BS.shape == (num_rows, length)
    return ModelInput(
        tokens_BS=move(batch.tokens_BS),
        positions_BS=move(batch.positions_BS),
        packed=packed,
        trained_rows=move(trained_rows),
        labels_R=move(labels),
        weights_R=move(weights[trained_rows]),
        image_rows=move((starts[:, None] + steps[None]).flatten()),
    )
