"""A layer of the vision tower as two compiled operations around one attention kernel.

It computes what transformers' SigLIP and CLIP layers compute, from their own parameters: queries,
keys and values come out of one matrix product, attention reads and writes without copies, and what
lies between matrix products (norms, GELU, residual sums, bias gradients) is fused by PyTorch's
compiler, which also decides what the backward computes again instead of keeping it.

Shape legend: N images, P patches, C tower width, F MLP width, h heads, d head width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""By transformers' `hidden_act`."""

_linear = torch.ops.aten.linear
"""Not `F.linear`, in whose place DeepSpeed's stage 3 puts an autograd function of its own: compiled
by PyTorch 2.11, that lost all gradients of the layers."""

Linear = tuple[torch.Tensor, torch.Tensor]
"""Weight and bias."""

TUNED_FOR = 32
"""Images of which the compiler thinks when it cuts sums into parts and chooses blocks. Without it
these would be those of the first call, and a resumed run, which begins with another number of
images than the run that it goes on with, would add in another order."""


class Weights(NamedTuple):
    """What a layer computes with; queries, keys and values are one matrix."""

    norm1: Linear
    qkv: Linear
    out: Linear
    norm2: Linear
    fc1: Linear
    fc2: Linear


def before_attention(x_NPC: torch.Tensor, norm: Linear, qkv: Linear, *, eps: float) -> torch.Tensor:
    """Norm, and queries, keys and values in one product: [N, P, 3 * C]."""
    return _linear(F.layer_norm(x_NPC, x_NPC.shape[-1:], *norm, eps), *qkv)


def after_attention(
    x_NPC: torch.Tensor,
    attended_NPC: torch.Tensor,
    out: Linear,
    norm: Linear,
    fc1: Linear,
    fc2: Linear,
    *,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """Output product, residual sum, norm, MLP, residual sum: [N, P, C]."""
    x_NPC = x_NPC + _linear(attended_NPC, *out)
    hidden_NPF = _linear(F.layer_norm(x_NPC, x_NPC.shape[-1:], *norm, eps), *fc1)
    return x_NPC + _linear(_ACTIVATIONS[activation](hidden_NPF), *fc2)


class _JoinWeights(torch.autograd.Function):
    """A layer's parameters as `Weights`, flat; gradients go to the parameters' sums at once.

    Where a parameter has `main_grad`, an fp32 sum over micro-batches, its gradient is added there
    in one kernel, and autograd gets none; without it autograd would convert it first. The compiler
    sees no parameter either, of which it would refuse one with a gradient of another dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: Sequence[torch.Tensor | None], *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.sums = sums
        norm, qkv, rest = parameters[:2], parameters[2:8], parameters[8:]
        joined = (torch.cat(qkv[0::2]), torch.cat(qkv[1::2]))
        return (*_same(norm), *joined, *_same(rest))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        norm, (weight, bias), rest = gradients[:2], gradients[2:4], gradients[4:]
        qkv = [part for pair in zip(weight.chunk(3), bias.chunk(3), strict=True) for part in pair]
        left: list[torch.Tensor | None] = []
        for needed, total, gradient in zip(
            ctx.needs_input_grad[1:], ctx.sums, (*norm, *qkv, *rest), strict=True
        ):
            if needed and total is not None:
                total += gradient
            left.append(gradient if needed and total is None else None)
        return None, *left


def _same(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    # Not views: the compiler looks at the tensor that a view is of, parameter and gradient.
    return [x.new_empty(0).set_(x) for x in tensors]


def weights_of(layer: nn.Module) -> Weights:
    """The parameters of a layer of transformers' SigLIP or CLIP."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (
        layer.layer_norm1,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.out_proj,
        layer.layer_norm2,
        mlp.fc1,
        mlp.fc2,
    )
    parameters = [p for module in modules for p in (module.weight, module.bias)]
    sums = [getattr(parameter, "main_grad", None) for parameter in parameters]
    flat = _JoinWeights.apply(sums, *parameters)
    return Weights(*zip(flat[0::2], flat[1::2], strict=True))


def attend(qkv_NPD: torch.Tensor, *, num_heads: int) -> torch.Tensor:
    """Full attention within each image: [N, P, C], from [N, P, 3 * C]."""
    heads = qkv_NPD.unflatten(2, (3, num_heads, -1)).unbind(2)
    q, k, v = (part_NPhd.transpose(1, 2) for part_NPhd in heads)
    with _kernels(q.device):
        attended_NhPd = F.scaled_dot_product_attention(q, k, v)
    return attended_NhPd.transpose(1, 2).flatten(2)


def _kernels(device: torch.device) -> AbstractContextManager:
    if device.type != "cuda":
        return nullcontext()
    if torch.are_deterministic_algorithms_enabled():
        # cuDNN's backward may add in any order.
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    return sdpa_kernel(order, set_priority=True)


class FusedLayers:
    """Runs layers of transformers' SigLIP and CLIP towers by the functions above.

    Args:
        compiled: Through PyTorch's compiler; else as they stand. What it compiles serves all
            layers and all numbers of images.
    """

    def __init__(self, *, compiled: bool):
        self.compiled = compiled
        self._before, self._after = before_attention, after_attention
        if compiled:
            # `fullgraph`: what cannot be compiled, or not once for all layers, is an error.
            self._before = torch.compile(before_attention, fullgraph=True)
            self._after = torch.compile(after_attention, fullgraph=True)

    def __call__(self, layer: nn.Module, x_NPC: torch.Tensor) -> torch.Tensor:
        """One layer: [N, P, C].

        Args:
            layer: transformers' module, for its parameters and settings.
            x_NPC: Hidden states.
        """
        before, after = self._before, self._after
        if len(x_NPC) < 2:
            # The compiler takes sizes 0 and 1 for other programs.
            before, after = before_attention, after_attention
        weights, eps = weights_of(layer), layer.layer_norm1.eps
        qkv_NPD = before(self._many(x_NPC), weights.norm1, weights.qkv, eps=eps)
        attended_NPC = attend(qkv_NPD, num_heads=layer.self_attn.num_heads)
        return after(
            self._many(x_NPC),
            self._many(attended_NPC),
            weights.out,
            weights.norm2,
            weights.fc1,
            weights.fc2,
            eps=eps,
            activation=layer.self_attn.config.hidden_act,
        )

    def _many(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """`x_NPC`, of which the number of images may be any."""
        if self.compiled and len(x_NPC) >= 2:
            from torch._dynamo import mark_dynamic  # takes a second to import

            mark_dynamic(x_NPC, 0, hint_override=TUNED_FOR)
        return x_NPC
