"""How a parameter of the LLM is cut between tensor-parallel ranks, by its global name.

Names are those of the single-device model: `decoder.layers.{i}.self_attention.linear_qkv.weight`
and so on, with the norms under their own names whichever layer implementation holds them.
"""

import re

import torch

VOCABULARIES = ("embedding.weight", "head.weight")
"""Parameters with a row for each token."""

_TE_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine fuses a norm with the linear layer behind it and names it after that layer."""


def canonical_name(name: str) -> str:
    """The global name of a parameter, independent of the layer implementation."""
    for fused, plain in _TE_NORMS.items():
        if name.endswith(fused):
            return name[: -len(fused)] + plain
    return name


def partition_dim(name: str) -> int | None:
    """The dimension along which a parameter is cut; None when every tensor-parallel rank holds all
    of it."""
    if re.search(
        r"(linear_qkv\.(weight|bias)|linear_fc1\.weight|embedding\.weight|head\.weight)$", name
    ):
        return 0
    if re.search(r"(linear_proj|linear_fc2)\.weight$", name):
        return 1
    return None


def shard(full: torch.Tensor, name: str, *, size: int, rank: int, gated: bool) -> torch.Tensor:
    """The part of `full` that tensor-parallel rank `rank` of `size` holds.

    `gated` says that linear_fc1 stacks gate and up projections; each rank holds its part of both,
    gate first.
    """
    dim = partition_dim(name)
    if dim is None or size == 1:
        return full
    if gated and name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size, dim=0)[rank] for half in full.chunk(2, dim=0)])
    return full.chunk(size, dim=dim)[rank]


def unshard(parts: list[torch.Tensor], name: str, *, gated: bool) -> torch.Tensor:
    """Put the parts of all tensor-parallel ranks together again; the inverse of `shard`."""
    dim = partition_dim(name)
    if dim is None or len(parts) == 1:
        return parts[0]
    if gated and name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2, dim=0) for part in parts]
        return torch.cat([torch.cat([h[i] for h in halves]) for i in (0, 1)])
    return torch.cat(parts, dim=dim)
