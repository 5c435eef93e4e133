"""Output layer and cross-entropy in one operation, which never holds the scores of the sequence.

Rows go in chunks through the matrix product, softmax statistics, loss, and the gradient of the
scores in their place; what they add to the gradients of hidden states and weight is ready when the
forward ends, so that the backward only scales it. A gradient in the forward over chunks of rows is
the idea of Liger-Kernel's `fused_linear_cross_entropy`, statistics over a cut vocabulary are those
of Megatron-Core's `vocab_parallel_cross_entropy`; here one all-gather a chunk carries them.

Shape legend: R rows of the loss, H hidden, V this tensor rank's part of the vocabulary, T tensor
ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch.autograd.function import once_differentiable

from ghostvis_mega.model.loss_chunks import CHUNK_BYTES, row_chunks
from ghostvis_mega.model.loss_kernels import LossKernels, TorchLossKernels

_DOT_BLOCK = 4096
"""Columns or rows of a product that are held in fp32 at a time, where BLAS cannot sum BF16 in
fp32."""


@dataclass(frozen=True)
class LossTargets:
    """What the rows are scored for."""

    labels_R: torch.Tensor
    """int64 tokens."""
    weights_R: torch.Tensor
    """fp32 weight of each row's loss."""
    tokens: int
    """Rows of the whole vocabulary that are tokens; those behind them are padding."""
    chunk_bytes: int = CHUNK_BYTES
    """Most that the scores of one chunk may take."""
    kernels: LossKernels | None = None
    """None: those that suit the device."""
    expected_grad: float | None = None
    """Gradient that the loss will get in the backward, where that is known: gradients are made for
    it, and a weight with `main_grad` has its own added there at once, without a buffer between.
    Another gradient than this one is an error then. None: gradients are scaled in the backward."""


@dataclass(frozen=True)
class _Job:
    """What the operation needs beside tensors that have gradients."""

    targets: LossTargets
    group: Any
    kernels: LossKernels
    hidden_trains: bool
    weight_trains: bool
    main_grad: torch.Tensor | None
    """fp32 [V, H] that the weight's gradient is added to in the forward."""


def head_loss(
    hidden_RH: torch.Tensor, weight_VH: torch.Tensor, targets: LossTargets, *, group: Any
) -> torch.Tensor:
    """Weighted sum of the rows' cross-entropy, fp32 scalar, the same on all tensor ranks.

    The gradient of `hidden_RH` is that of this rank's part of the vocabulary: the caller sums over
    the tensor ranks. The weight's is fp32 whatever the weight is; a BF16 parameter whose
    `grad_dtype` is fp32 gets it unrounded.

    Args:
        hidden_RH: fp32 or BF16; equal on all tensor ranks.
        weight_VH: This rank's rows of the output matrix.
        targets: Labels and weights, equal on all tensor ranks.
        group: Tensor-parallel process group.
    """
    grad = torch.is_grad_enabled()
    known = targets.expected_grad is not None
    job = _Job(
        targets=targets,
        group=group,
        kernels=targets.kernels or default_kernels(weight_VH.device),
        hidden_trains=grad and hidden_RH.requires_grad,
        weight_trains=grad and weight_VH.requires_grad,
        main_grad=getattr(weight_VH, "main_grad", None) if known else None,
    )
    return _HeadLoss.apply(hidden_RH, weight_VH, job)


def default_kernels(device: torch.device) -> LossKernels:
    """Fused ones on a GPU."""
    if device.type != "cuda":
        return TorchLossKernels()
    from ghostvis_mega.model.triton_kernels import TritonLossKernels

    return TritonLossKernels()


class _HeadLoss(torch.autograd.Function):
    """The operation; gradients are made in `forward`, for as long as the scores are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, job: _Job
    ) -> torch.Tensor:
        targets, columns = job.targets, weight_VH.shape[0]
        first = job.group.rank() * columns
        valid = min(max(targets.tokens - first, 0), columns)
        labels_R, weights_R = targets.labels_R - first, targets.weights_R.float()
        scale = 1.0 if targets.expected_grad is None else targets.expected_grad
        scaled_R = weights_R * scale
        change_RH = change_VH = None
        if job.hidden_trains:
            change_RH = torch.zeros_like(hidden_RH, dtype=torch.float32)
        added = job.weight_trains and job.main_grad is not None
        if job.weight_trains:
            change_VH = job.main_grad if added else torch.empty_like(weight_VH, dtype=torch.float32)
        loss_R = torch.zeros_like(weights_R)
        row_bytes = columns * hidden_RH.element_size()
        chunks = row_chunks(len(hidden_RH), row_bytes, chunk_bytes=targets.chunk_bytes)
        scores_RV = hidden_RH.new_empty(chunks[0].stop if chunks else 0, columns)
        for number, rows in enumerate(chunks):
            x_RH, labels, weights = hidden_RH[rows], labels_R[rows], scaled_R[rows]
            logits_RV = torch.mm(x_RH, weight_VH.t(), out=scores_RV[: len(x_RH)])
            own_R3 = job.kernels.statistics(logits_RV, labels, columns=valid)
            peaks, sums, scores = _over_ranks(own_R3, job.group)
            loss_R[rows] = sums.log() + (peaks - scores)
            if change_RH is None and change_VH is None:
                continue
            job.kernels.gradient_(
                logits_RV,
                labels,
                peaks_R=peaks,
                shares_R=weights / sums,
                weights_R=weights,
                columns=valid,
            )
            if change_RH is not None:
                _product(change_RH[rows], logits_RV, weight_VH, add=False)
            if change_VH is not None:
                _product(change_VH, logits_RV.t(), x_RH, add=added or number > 0)
        if change_VH is not None and not chunks and not added:
            change_VH.zero_()
        ctx.save_for_backward(change_RH, None if added else change_VH)
        ctx.dtype, ctx.expected_grad = hidden_RH.dtype, targets.expected_grad
        return (loss_R * weights_R).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: the weight's gradient is as large as the whole output layer in fp32. A second
        # backward through the same loss is refused by autograd, which sees the change.
        change_RH, change_VH = ctx.saved_tensors
        if ctx.expected_grad is None:
            for change in (change_RH, change_VH):
                if change is not None:
                    change.mul_(grad)
        else:
            off = (grad - ctx.expected_grad).abs() > 1e-5 * abs(ctx.expected_grad)
            torch.ops.aten._assert_async.msg(
                ~off, f"the loss was to get the gradient {ctx.expected_grad}"
            )
        return None if change_RH is None else change_RH.to(ctx.dtype), change_VH, None


def _over_ranks(own_R3: torch.Tensor, group: Any) -> tuple[torch.Tensor, ...]:
    """Each row's largest score, sum of exp(score - largest) and label's score, over the whole
    vocabulary: fp32 [R] each."""
    all_TR3 = mappings.gather_from_sequence_parallel_region(own_R3, group=group)
    peaks_TR, sums_TR, scores_TR = all_TR3.view(-1, *own_R3.shape).unbind(-1)
    peaks_R = peaks_TR.amax(0)
    sums_R = (sums_TR * (peaks_TR - peaks_R).exp()).sum(0)
    # A label that no rank has stays -inf, and the loss infinite.
    return peaks_R, sums_R, scores_TR.amax(0)


def _product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool) -> None:
    """Matrix product, summed in fp32, into fp32 `out` or added to it."""
    beta = 1.0 if add else 0.0
    if left.dtype == torch.float32:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif left.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, beta=beta, out=out)
    else:
        # The CPU's BF16 product would round what is summed to BF16.
        if not add:
            out.zero_()
        parts = zip(left.split(_DOT_BLOCK, dim=1), right.split(_DOT_BLOCK), strict=True)
        for left_part, right_part in parts:
            out.addmm_(left_part.float(), right_part.float())
