"""A layer of the vision tower as two operations around one attention kernel.

It computes what the tower's modules (`vision_tower`) compute, from their own parameters: queries,
keys and values come out of one matrix product, attention reads and writes without copies, and
forward and backward of what lies around it are written out here, so that each step can be a kernel
that does several things at once (`vision_kernels`). Gradients of parameters that have `main_grad`,
an fp32 sum over micro-batches, are added there, and autograd gets none; without it autograd would
convert them first.

Shape legend: N images, P patches, R = N x P rows, C tower width, h heads, d head width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostvis_mega.model.vision_kernels import LayerKernels
from ghostvis_mega.model.vision_tower import VisionLayer


class Settings(NamedTuple):
    """Of a layer."""

    eps: float
    activation: str
    """transformers' `hidden_act`."""


Gradients = tuple[torch.Tensor | None, ...]


class BeforeAttention(torch.autograd.Function):
    """Norm, and queries, keys and values in one product: [R, 3 * C].

    Parameters: weight and bias of the norm and of the three products, in this order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: LayerKernels,
        settings: Settings,
        x_RC: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """See the class."""
        norm_weight, norm_bias, *qkv = parameters
        weight, bias = torch.cat(qkv[0::2]), torch.cat(qkv[1::2])
        normed = kernels.norm(x_RC, norm_weight, norm_bias, eps=settings.eps)
        ctx.kernels, ctx.parameters = kernels, parameters
        ctx.save_for_backward(x_RC, *normed, weight, bias)
        return kernels.linear(normed[0], weight, bias)

    @staticmethod
    def backward(ctx: Any, d_RD: torch.Tensor) -> Gradients:
        """Gradients of rows and parameters."""
        x_RC, *normed, weight, bias = ctx.saved_tensors
        kernels: LayerKernels = ctx.kernels
        d_RD = d_RD.contiguous()
        d_weight, d_bias = kernels.weight_gradient(d_RD, normed[0], bias, None)
        assert d_weight is not None, "it had no sum to go to"
        d_x_RC, *d_norm = kernels.norm_backward(
            kernels.input_gradient(d_RD, weight), x_RC, tuple(normed), ctx.parameters[0]
        )
        qkv = [
            part for pair in zip(d_weight.chunk(3), d_bias.chunk(3), strict=True) for part in pair
        ]
        return None, None, d_x_RC, *map(_left, ctx.parameters, (*d_norm, *qkv))


class AfterAttention(torch.autograd.Function):
    """Output product, residual sum, norm, MLP, residual sum: [R, C].

    Parameters: weight and bias of the output product, the norm, and the MLP's two products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: LayerKernels,
        settings: Settings,
        x_RC: torch.Tensor,
        attended_RC: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """See the class."""
        out, out_bias, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias = parameters
        middle_RC = kernels.linear(attended_RC, out, out_bias).add_(x_RC)
        normed = kernels.norm(middle_RC, norm_weight, norm_bias, eps=settings.eps)
        activated_RF, before_RF = kernels.linear_activated(
            normed[0], fc1, fc1_bias, name=settings.activation
        )
        ctx.kernels, ctx.settings, ctx.parameters = kernels, settings, parameters
        ctx.save_for_backward(attended_RC, middle_RC, *normed, before_RF, activated_RF)
        return kernels.linear(activated_RF, fc2, fc2_bias).add_(middle_RC)

    @staticmethod
    def backward(ctx: Any, d_RC: torch.Tensor) -> Gradients:
        """Gradients of rows, attended rows and parameters."""
        attended_RC, middle_RC, *normed, before_RF, activated_RF = ctx.saved_tensors
        out, out_bias, *norm, fc1, fc1_bias, fc2, fc2_bias = ctx.parameters
        kernels: LayerKernels = ctx.kernels
        d_RC = d_RC.contiguous()
        d_fc2, d_fc2_bias = kernels.weight_gradient(d_RC, activated_RF, fc2_bias, _sum(fc2))
        d_RF = kernels.activated_gradient(d_RC, fc2, before_RF, name=ctx.settings.activation)
        d_fc1, d_fc1_bias = kernels.weight_gradient(d_RF, normed[0], fc1_bias, _sum(fc1))
        d_middle_RC, *d_norm = kernels.norm_backward(
            kernels.input_gradient(d_RF, fc1), middle_RC, tuple(normed), norm[0]
        )
        d_middle_RC = d_middle_RC.add_(d_RC)
        d_out, d_out_bias = kernels.weight_gradient(d_middle_RC, attended_RC, out_bias, _sum(out))
        d_attended_RC = kernels.input_gradient(d_middle_RC, out)
        return (
            *(None, None, d_middle_RC, d_attended_RC),
            *(d_out, _left(out_bias, d_out_bias)),
            *map(_left, norm, d_norm),
            *(d_fc1, _left(fc1_bias, d_fc1_bias)),
            *(d_fc2, _left(fc2_bias, d_fc2_bias)),
        )


def _sum(parameter: torch.Tensor) -> torch.Tensor | None:
    """Of its gradients, where there is one while the backward runs."""
    return getattr(parameter, "main_grad", None)


def _left(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """What is left for autograd of a gradient once its sum has it."""
    total = _sum(parameter)
    if total is None:
        return gradient
    total += gradient
    return None


def attend(qkv_NPD: torch.Tensor, *, num_heads: int) -> torch.Tensor:
    """Full attention within each image: [N, P, C], from [N, P, 3 * C]."""
    heads = qkv_NPD.unflatten(2, (3, num_heads, -1)).unbind(2)
    q, k, v = (part_NPhd.transpose(1, 2) for part_NPhd in heads)
    with _attention_kernels(q.device):
        attended_NhPd = F.scaled_dot_product_attention(q, k, v)
    return attended_NhPd.transpose(1, 2).flatten(2)


def _attention_kernels(device: torch.device) -> AbstractContextManager:
    if device.type != "cuda":
        return nullcontext()
    if torch.are_deterministic_algorithms_enabled():
        # cuDNN's backward may add in any order.
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    return sdpa_kernel(order, set_priority=True)


class FusedLayers:
    """Runs layers of SigLIP and CLIP towers by the functions above."""

    def __init__(self, kernels: LayerKernels):
        self.kernels = kernels

    def __call__(self, layer: VisionLayer, x_NPC: torch.Tensor) -> torch.Tensor:
        """One layer: [N, P, C].

        Args:
            layer: For its parameters and settings.
            x_NPC: Hidden states.
        """
        attention, mlp = layer.self_attn, layer.mlp
        settings = Settings(layer.layer_norm1.eps, mlp.activation)
        products = (attention.q_proj, attention.k_proj, attention.v_proj)
        first = _parameters(layer.layer_norm1, *products)
        second = _parameters(attention.out_proj, layer.layer_norm2, mlp.fc1, mlp.fc2)
        x_RC = x_NPC.flatten(0, 1).contiguous()
        qkv_RD = BeforeAttention.apply(self.kernels, settings, x_RC, *first)
        attended_NPC = attend(qkv_RD.unflatten(0, x_NPC.shape[:2]), num_heads=attention.num_heads)
        attended_RC = attended_NPC.flatten(0, 1).contiguous()
        out_RC = AfterAttention.apply(self.kernels, settings, x_RC, attended_RC, *second)
        return out_RC.unflatten(0, x_NPC.shape[:2])


def _parameters(*modules: nn.Module) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in (module.weight, module.bias)]
