"""Dropout that no layout can see: each decision is a function of what it is about, not of where or
when it is made.

Usual dropout draws from a generator, so a mask depends on the rank, on the order of micro-batches
and on what was drawn before; two layouts then train two different models, and recomputed
activations need saved generator states. Here every element's fate is a hash of (seed, step, the
row's first sample, position in the row, layer, site, column): tensor, sequence, context, pipeline
and data parallelism, micro-batches and recomputation all give one and the same mask. The row's
sample and the position are what a rank must know; they travel with the input as one 64-bit key a
position.

Shape legend: S rows of activations on this rank, B batch, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from ghostvis_mega.config.schema import RunConfig

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_LANES = 4
"""Decisions a hash: 16 bits each."""
_LEVELS = 1 << 16

EMBEDDING = 0
"""Layer number of the dropout before the first layer; Megatron-Core counts layers from 1."""
ATTENTION, MLP = 0, 1
"""Sites of a layer."""


@dataclass(frozen=True)
class Draw:
    """What the masks of one optimizer step depend on, beside the place in the model and batch."""

    seed: int
    step: int

    @classmethod
    def of(cls, run: RunConfig, *, step: int) -> "Draw | None":
        """The draw of a training step; None where nothing is dropped."""
        if run.model.llm.hidden_dropout == 0.0:
            return None
        return cls(seed=run.train.seed, step=step)


def position_keys(draw: Draw, *, row_samples: Sequence[int], rows_S: torch.Tensor) -> torch.Tensor:
    """One key for each position of a micro-batch: int64 [S, B].

    Args:
        draw: Seed and step.
        row_samples: First sample of each of the B rows.
        rows_S: int64, positions in the row that this rank computes.
    """
    rows = []
    for sample in row_samples:
        key = 0
        for part in (draw.seed, draw.step, sample):
            key = _mix_int(key + (part + 1) * _GOLDEN)
        rows.append(_signed(key))
    keys_B = torch.tensor(rows, dtype=torch.int64, device=rows_S.device)
    return _mix(keys_B[None] + (rows_S[:, None] + 1) * _signed(_GOLDEN))


def drop_level(rate: float) -> int:
    """The rate in 65,536ths: what is really dropped."""
    return min(max(round(rate * _LEVELS), 1), _LEVELS - 1) if rate > 0 else 0


def kept(keys_SB: torch.Tensor, *, layer: int, site: int, width: int, rate: float) -> torch.Tensor:
    """Which elements stay: bool [S, B, H].

    Args:
        keys_SB: From `position_keys`.
        layer: Number of the layer in the whole model.
        site: Which dropout of the layer.
        width: H.
        rate: Share that is dropped, to the next 65,536th.
    """
    # A key for this place in the model, then one hash for every four columns.
    place_SB = _mix(keys_SB ^ _signed(_mix_int((2 * layer + site + 1) * _GOLDEN)))
    groups = torch.arange(1, -(-width // _LANES) + 1, device=keys_SB.device)
    hashes = _mix(place_SB[..., None] + groups * _signed(_GOLDEN))
    lanes_SBH = hashes.view(torch.int16)[..., :width]
    return lanes_SBH >= drop_level(rate) - _LEVELS // 2


def drop(
    x_SBH: torch.Tensor, keys_SB: torch.Tensor, *, layer: int, site: int, rate: float
) -> torch.Tensor:
    """Zero some elements and scale up the others, so that the mean stays."""
    return _Drop.apply(x_SBH, keys_SB, layer, site, rate)


class _Drop(torch.autograd.Function):
    """Makes the mask again in the backward: nothing but the keys is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, keys_SB: torch.Tensor, layer: int, site: int, rate: float
    ) -> torch.Tensor:
        ctx.save_for_backward(keys_SB)
        ctx.place = {"layer": layer, "site": site, "rate": rate}
        return _apply(x, keys_SB, **ctx.place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (keys_SB,) = ctx.saved_tensors
        return _apply(gradient, keys_SB, **ctx.place), None, None, None, None


def _apply(
    x: torch.Tensor, keys_SB: torch.Tensor, *, layer: int, site: int, rate: float
) -> torch.Tensor:
    keep = kept(keys_SB, layer=layer, site=site, width=x.shape[-1], rate=rate)
    scale = _LEVELS / (_LEVELS - drop_level(rate))
    return torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype, device=x.device))


class DropoutAdd:
    """Takes the place of Megatron-Core's bias-dropout-add: `residual + dropout(x + bias)`.

    Args:
        site: Which dropout of the layer.
    """

    def __init__(self, *, site: int):
        self.site = site
        self.place: tuple[torch.Tensor, int] | None = None
        """Keys and layer number, while the layer's forward runs."""

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that Megatron-Core calls with (x, bias), residual and rate."""

        def add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None],
            residual: torch.Tensor,
            rate: float,
        ) -> torch.Tensor:
            x, bias = x_with_bias
            x = x if bias is None else x + bias
            if training:
                assert self.place is not None, "dropout outside of its layer's forward"
                keys_SB, layer = self.place
                x = drop(x, keys_SB, layer=layer, site=self.site, rate=rate)
            return residual + x

        return add


class DropoutLayer(TransformerLayer):
    """A transformer layer whose dropout takes its keys from the layer's arguments.

    Megatron-Core hands `context_mask` through to every layer, with activation checkpointing as
    well, where a recomputed forward gets the very same argument. It is made for cross-attention,
    which this model has none of.
    """

    def forward(
        self, *args: Any, context_mask: torch.Tensor | None = None, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `TransformerLayer.forward`, with `context_mask` the keys of this rank's positions."""
        if self.training and context_mask is None:
            raise ValueError("training with hidden_dropout needs keys in context_mask")
        sites = (self.self_attn_bda, self.mlp_bda)
        for site in sites:
            site.place = None if context_mask is None else (context_mask, self.layer_number)
        try:
            return super().forward(*args, **keywords)
        finally:
            for site in sites:
                site.place = None


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    """splitmix64's finalizer of a number, modulo 2**64."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _MIX_1 & _MASK
    value = (value ^ (value >> 27)) * _MIX_2 & _MASK
    return value ^ (value >> 31)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The same of int64 tensors, whose products wrap; works in place on a temporary."""
    x = x ^ _shifted(x, 30)
    x *= _signed(_MIX_1)
    x ^= _shifted(x, 27)
    x *= _signed(_MIX_2)
    x ^= _shifted(x, 31)
    return x


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that brings in zeros: PyTorch's brings in the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
