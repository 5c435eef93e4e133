"""Kernels for GPUs: what the loss does between its matrix products, and the embedding's gradient.

In the loss one pass reads the scores for the statistics (an online softmax), one replaces them by
their gradient. Everywhere each element is written by one program and sums run in a fixed order, so
equal input gives equal bits.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096
"""Columns that a program holds at a time; a row of 152,000 takes 38 of them."""
_ROW_BLOCK = 512
"""Columns of a row of the embedding that a program adds up."""


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


@triton.jit
def add_rows_kernel(ids, order, ends, rows, out, width, BLOCK: tl.constexpr):
    """All rows with one id, added to that row of `out` by the first of them."""
    first = tl.program_id(0)
    row = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if row != before:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        total = tl.load(out + row * width + at, mask=inside, other=0.0)
        for place in range(first, tl.load(ends + first)):
            source = rows + tl.load(order + place) * width
            total += tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + at, total, mask=inside)


def add_rows(out_VH: torch.Tensor, at_n: torch.Tensor, rows_nH: torch.Tensor) -> None:
    """Add each row to the row of `out_VH` that `at_n` names; negative ones drop it.

    Args:
        out_VH: fp32, contiguous; written.
        at_n: int64.
        rows_nH: fp32 or BF16, contiguous.
    """
    assert out_VH.is_contiguous() and rows_nH.is_contiguous(), "the kernel counts in whole rows"
    ids_n, order_n = at_n.sort(stable=True)
    ends_n = torch.searchsorted(ids_n, ids_n, right=True)
    count, width = rows_nH.shape
    # A negative id equals the one that stands before the first.
    add_rows_kernel[(count, triton.cdiv(width, _ROW_BLOCK))](
        ids_n, order_n, ends_n, rows_nH, out_VH, width, BLOCK=_ROW_BLOCK, num_warps=4
    )


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
