"""What gradients still lack after the backward passes and before the data-parallel reduction."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ghostvis_mega.parallel.groups import Groups


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every trained parameter a gradient: zeros where this rank had nothing to learn from.

    DeepSpeed skips parameters without one, rank by rank; buckets would then differ between ranks
    and hang.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            dtype = parameter.grad_dtype or parameter.dtype
            parameter.grad = torch.zeros_like(parameter, dtype=dtype)


def not_finite(tensors: Sequence[torch.Tensor], *, device: torch.device) -> torch.Tensor:
    """1.0 where any element is infinite or no number, else 0.0: fp32 scalar, without waiting for
    the device."""
    if not tensors:
        return torch.zeros((), device=device)
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])
    return (~torch.isfinite(norms)).any().float()


def sum_sequence_parallel_gradients(parameters: Iterable[nn.Parameter], groups: Groups) -> None:
    """Add up the gradients of parameters that saw only a part of the sequence (the norms)."""
    partial = [
        p.grad for p in parameters if p.requires_grad and getattr(p, "sequence_parallel", False)
    ]
    if not partial or groups.degrees.tensor == 1:
        return
    flat = _flatten_dense_tensors(partial)
    dist.all_reduce(flat, group=groups.tensor)
    for gradient, total in zip(partial, _unflatten_dense_tensors(flat, partial), strict=True):
        gradient.copy_(total)


def sum_tied_gradients(tied: nn.Parameter | None, groups: Groups) -> None:
    """Add up the gradients of the embedding on the first stage and of its copy, the head, on the
    last.

    Args:
        tied: This rank's copy; None where weights are not tied across stages.
        groups: Of this rank.
    """
    if tied is None or groups.embedding is None or not tied.requires_grad:
        return
    dist.all_reduce(tied.grad, group=groups.embedding)


def average_gradients(
    parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, *, bucket_elements: int
) -> None:
    """Average gradients over a group, in flat buckets of about `bucket_elements`.

    For ZeRO stage 0: DeepSpeed's own reduction asks a module-level variable for the group, which
    holds that of the engine created last.
    """
    bucket: list[torch.Tensor] = []
    for gradient in [*(p.grad for p in parameters), None]:
        if gradient is not None:
            bucket.append(gradient)
        if bucket and (gradient is None or sum(g.numel() for g in bucket) >= bucket_elements):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat, group=group)
            flat /= group.size()
            for part, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                part.copy_(mean)
            bucket = []
