"""What a training step gets: which sequences, and their tensors.

Legend: B rows, S positions of a row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ImageSlot:
    """One place for an image: its tokens_per_image positions begin at (row, start)."""

    image_id: int
    row: int
    start: int


@dataclass(frozen=True)
class SequenceMeta:
    """One sequence (a pack, or a row without packing), from the index alone.

    `num_tokens` counts useful positions: images expanded, no padding. `image_ids` has one entry an
    image slot, in order, so an id may repeat. `pieces` says which stored tokens of each sample lie
    here (the first, and how many; see `data.pieces`), and is empty where all samples are whole.
    """

    sample_ids: tuple[int, ...]
    num_tokens: int
    trained_tokens: int
    image_ids: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class SequenceLayout:
    """Where things lie in one sequence, from the index alone."""

    segments: tuple[int, ...]
    """Lengths of the stretches that attend within themselves, padding tail included."""
    image_ids: tuple[int, ...]
    """One an image slot, in order."""
    image_starts: tuple[int, ...]
    """Position at which each slot begins."""


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one micro-batch, on the CPU.

    Args:
        tokens_BS: int64; image positions hold the <|image|> id, padding holds <|pad|>.
        labels_BS: int64; the next token of the same sample, 0 where the weight is 0.
        weights_BS: float32; 1.0 where the label is trained.
        positions_BS: int64; restart at 0 at each sample, and at the padding tail; they run on over
            padding that fills a sample's own segment (`segment_align`).
        cu_seqlens: int32 [segments + 1] from 0 to S for a packed row (B == 1), where the padding
            tail is a segment of its own; None without packing.
        max_seqlen: longest segment of a packed row, else S.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    weights_BS: torch.Tensor
    positions_BS: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    images: tuple[ImageSlot, ...]
    sample_ids: tuple[int, ...]


@dataclass(frozen=True)
class Damage:
    """What one rank found damaged while it read a step: numbers of samples and of images."""

    samples: frozenset[int] = frozenset()
    images: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.samples) + len(self.images)


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences of one optimizer step: replicas[data-parallel rank][micro-batch][row].

    `epochs` has one entry a dataset: the epoch of its next sequence when the step begins.
    """

    step: int
    epochs: tuple[int, ...]
    replicas: tuple[tuple[tuple[SequenceMeta, ...], ...], ...]

    @property
    def epoch(self) -> int:
        """Epoch of the first dataset."""
        return self.epochs[0]

    @cached_property
    def sequences(self) -> tuple[SequenceMeta, ...]:
        """All sequences, rank by rank."""
        return tuple(row for replica in self.replicas for micro in replica for row in micro)

    @property
    def trained_tokens(self) -> int:
        """Labels under the loss, over all ranks."""
        return sum(row.trained_tokens for row in self.sequences)

    @property
    def num_tokens(self) -> int:
        """Useful positions, over all ranks."""
        return sum(row.num_tokens for row in self.sequences)

    @property
    def num_samples(self) -> int:
        """Samples, over all ranks."""
        return sum(len(row.sample_ids) for row in self.sequences)

    @cached_property
    def image_ids(self) -> tuple[int, ...]:
        """Distinct images, ascending: what the tower encodes in this step."""
        return tuple(sorted({image_id for row in self.sequences for image_id in row.image_ids}))
