"""What the loss does between its matrix products, in plain PyTorch; the reference of all others.

Shape legend: R rows, V columns of this rank's part of the vocabulary.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

_BLOCK_ELEMENTS = 1 << 22
"""Scores that are held in fp32 at a time."""


class LossKernels(Protocol):
    """Implementations that the loss can be given."""

    def statistics(
        self, logits_RV: torch.Tensor, labels_R: torch.Tensor, *, columns: int
    ) -> torch.Tensor:
        """What this part of the vocabulary adds to each row's softmax, fp32 [R, 3].

        The largest score, the sum of exp(score - largest), and the score of the label, which is
        -inf where the label is not among these columns.

        Args:
            logits_RV: fp32 or BF16, contiguous.
            labels_R: int64 column of each row's label; outside of [0, columns) where another rank
                has it.
            columns: Those from here on are padding and count for nothing.
        """
        ...

    def gradient_(
        self,
        logits_RV: torch.Tensor,
        labels_R: torch.Tensor,
        *,
        peaks_R: torch.Tensor,
        shares_R: torch.Tensor,
        weights_R: torch.Tensor,
        columns: int,
    ) -> None:
        """Replace scores by exp(score - peak) * share, less the weight at the label; padding by 0.

        Args:
            logits_RV: fp32 or BF16, contiguous; written.
            labels_R: As above.
            peaks_R: fp32, the largest score of the whole vocabulary.
            shares_R: fp32, weight over the sum of exp(score - peak) over the whole vocabulary.
            weights_R: fp32, weight of the row's loss.
            columns: As above.
        """
        ...


class TorchLossKernels:
    """PyTorch's own operations, on any device; fp32 copies of a few rows at a time."""

    def statistics(
        self, logits_RV: torch.Tensor, labels_R: torch.Tensor, *, columns: int
    ) -> torch.Tensor:
        """Three passes over each block of rows."""
        out_R3 = torch.empty(len(logits_RV), 3, dtype=torch.float32, device=logits_RV.device)
        if columns == 0:
            out_R3[:] = out_R3.new_tensor([float("-inf"), 0.0, float("-inf")])
            return out_R3
        here_R, places_R = _places(labels_R, columns)
        for rows in _blocks(logits_RV):
            scores = logits_RV[rows, :columns].float()
            own = scores.gather(1, places_R[rows, None])[:, 0]
            peak = scores.amax(1)
            out_R3[rows, 0] = peak
            # A copy of its own, since `float` returns fp32 scores themselves.
            out_R3[rows, 1] = torch.sub(scores, peak[:, None]).exp_().sum(1)
            out_R3[rows, 2] = own.masked_fill(~here_R[rows], float("-inf"))
        return out_R3

    def gradient_(
        self,
        logits_RV: torch.Tensor,
        labels_R: torch.Tensor,
        *,
        peaks_R: torch.Tensor,
        shares_R: torch.Tensor,
        weights_R: torch.Tensor,
        columns: int,
    ) -> None:
        """In fp32, rounded once where scores are BF16."""
        logits_RV[:, columns:] = 0.0
        if columns == 0:
            return
        here_R, places_R = _places(labels_R, columns)
        own_R = weights_R.float() * here_R
        for rows in _blocks(logits_RV):
            scores = logits_RV[rows, :columns]
            change = scores.float().sub_(peaks_R[rows, None]).exp_().mul_(shares_R[rows, None])
            change.scatter_add_(1, places_R[rows, None], -own_R[rows, None])
            scores.copy_(change)


def _places(labels_R: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each label is among the columns, and a column that can be read in any case."""
    here_R = (labels_R >= 0) & (labels_R < columns)
    return here_R, labels_R.clamp(0, columns - 1)


def _blocks(logits_RV: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // logits_RV.shape[1])
    for start in range(0, len(logits_RV), rows):
        yield slice(start, start + rows)
