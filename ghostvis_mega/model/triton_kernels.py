"""What the loss does between its matrix products, fused for GPUs.

One pass reads the scores for the statistics (an online softmax), one replaces them by their
gradient. Each element is written by one program and sums run in a fixed order, so equal input gives
equal bits.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096
"""Columns that a program holds at a time; a row of 152,000 takes 38 of them."""


@triton.jit
def statistics_kernel(logits, labels, out, width, columns, BLOCK: tl.constexpr):
    """One row: largest score, sum of exp(score - largest), score of the label or -inf."""
    row = tl.program_id(0).to(tl.int64)
    scores = logits + row * width
    best = float("-inf")
    total = 0.0
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(scores + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(best, tl.max(x, axis=0))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), axis=0)
        best = higher
    label = tl.load(labels + row)
    here = (label >= 0) & (label < columns)
    own = tl.load(scores + label, mask=here, other=float("-inf")).to(tl.float32)
    tl.store(out + row * 3, best)
    tl.store(out + row * 3 + 1, total)
    tl.store(out + row * 3 + 2, own)


@triton.jit
def gradient_kernel(logits, labels, peaks, shares, weights, width, columns, BLOCK: tl.constexpr):
    """A block of one row: exp(score - peak) * share, less the weight at the label; padding 0."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * width + at
    inside = at < columns
    x = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    change = tl.exp(x - tl.load(peaks + row)) * tl.load(shares + row)
    change -= tl.where(at == tl.load(labels + row), tl.load(weights + row), 0.0)
    change = tl.where(inside, change, 0.0)
    tl.store(places, change.to(logits.dtype.element_ty), mask=at < width)


class TritonLossKernels:
    """Two kernels, each reading the scores once."""

    def statistics(
        self, logits_RV: torch.Tensor, labels_R: torch.Tensor, *, columns: int
    ) -> torch.Tensor:
        """A program a row."""
        count, width = logits_RV.shape
        assert logits_RV.is_contiguous() and labels_R.is_contiguous(), "kernels count in whole rows"
        out_R3 = torch.empty(count, 3, dtype=torch.float32, device=logits_RV.device)
        statistics_kernel[(count,)](
            logits_RV, labels_R, out_R3, width, columns, BLOCK=_BLOCK, num_warps=8
        )
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
        """A program for each block of a row."""
        count, width = logits_RV.shape
        given = (logits_RV, labels_R, peaks_R, shares_R, weights_R)
        assert all(tensor.is_contiguous() for tensor in given), "kernels count in whole rows"
        gradient_kernel[(count, triton.cdiv(width, _BLOCK))](
            *given, width, columns, BLOCK=_BLOCK, num_warps=8
        )
