"""Token embedding whose gradient goes straight into the fp32 sum of the micro-batches.

PyTorch's own backward makes a gradient of the whole matrix for each micro-batch, most of it zeros,
turns it into fp32 and adds it: four passes over the vocabulary for some thousand rows.

Shape legend: B rows of tokens, S their length, n = B * S, H hidden, V this tensor rank's part of
the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

NOWHERE = -1
"""In place of a token: no row of the matrix."""


def embed(weight_VH: torch.Tensor, tokens_BS: torch.Tensor, learn_BS: torch.Tensor) -> torch.Tensor:
    """Rows of the matrix, [B, S, H]; the backward adds to `weight_VH.main_grad`, in fixed order.

    Args:
        weight_VH: Has `main_grad`, fp32 [V, H].
        tokens_BS: int64 rows of this part of the vocabulary; `NOWHERE` gives zeros.
        learn_BS: The same, with `NOWHERE` where the gradient is known to be zero.
    """
    return _Embed.apply(weight_VH, tokens_BS, learn_BS)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_VH: torch.Tensor, tokens_BS: torch.Tensor, learn_BS: torch.Tensor
    ) -> torch.Tensor:
        ctx.main_grad = weight_VH.main_grad
        ctx.save_for_backward(learn_BS)
        found_BSH = F.embedding(tokens_BS.clamp(min=0), weight_VH)
        return found_BSH.masked_fill_((tokens_BS < 0)[..., None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSH: torch.Tensor) -> tuple[None, None, None]:
        (learn_BS,) = ctx.saved_tensors
        add_rows_(ctx.main_grad, learn_BS.flatten(), grad_BSH.flatten(0, 1))
        return None, None, None


def add_rows_(out_VH: torch.Tensor, at_n: torch.Tensor, rows_nH: torch.Tensor) -> None:
    """Add each row to the row of `out_VH` that `at_n` names; `NOWHERE` drops it.

    The sum is in fp32 and in the order of the rows, so that equal input gives equal bits.
    """
    if out_VH.device.type == "cuda":
        from ghostvis_mega.model.triton_kernels import add_rows

        add_rows(out_VH, at_n, rows_nH.contiguous())
        return
    real_n = at_n >= 0
    out_VH.index_add_(0, at_n[real_n], rows_nH[real_n].float())
