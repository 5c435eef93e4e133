"""Cutting weights between tensor-parallel ranks, and initial weights that no layout changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghostvis_mega.model.init import initialize, is_norm, name_seed
from ghostvis_mega.model.shards import canonical_name, partition_dim, shard, unshard

SHAPES = {
    "embedding.weight": (32, 12),
    "head.weight": (32, 12),
    "decoder.layers.0.input_layernorm.weight": (12,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (48, 12),
    "decoder.layers.0.self_attention.linear_qkv.bias": (48,),
    "decoder.layers.0.self_attention.linear_proj.weight": (12, 24),
    "decoder.layers.1.mlp.linear_fc1.weight": (40, 12),
    "decoder.layers.1.mlp.linear_fc2.weight": (12, 20),
    "decoder.final_layernorm.weight": (12,),
}
CUT = {name: dim for name in SHAPES if (dim := partition_dim(name)) is not None}


def local_shape(name: str, size: int) -> tuple[int, ...]:
    shape = list(SHAPES[name])
    if name in CUT:
        shape[CUT[name]] //= size
    return tuple(shape)


def initial_shards(
    *, size: int, rank: int, seed: int = 7, gated: bool = True
) -> dict[str, torch.Tensor]:
    named = [(name, nn.Parameter(torch.full(local_shape(name, size), 9.0))) for name in SHAPES]
    initialize(named, seed=seed, std=0.1, tensor_size=size, tensor_rank=rank, gated=gated)
    return {name: parameter.detach() for name, parameter in named}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_initial_shards_are_parts_of_the_same_tensors(size: int, gated: bool) -> None:
    whole = initial_shards(size=1, rank=0, gated=gated)
    ranks = [initial_shards(size=size, rank=rank, gated=gated) for rank in range(size)]
    for name, full in whole.items():
        parts = [shards[name] for shards in ranks]
        assert torch.equal(unshard(parts, name, gated=gated), full), name
        if name in CUT and not name.endswith("bias"):
            assert not torch.equal(parts[0], parts[1]), f"the ranks of {name} hold the same part"


def test_initial_values_follow_from_seed_and_name() -> None:
    first, again, other = (initial_shards(size=1, rank=0, seed=seed) for seed in (7, 7, 8))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("bias"):
            assert not tensor.any()
        elif "norm" in name:
            assert (tensor == 1.0).all()
        else:
            assert not torch.equal(tensor, other[name])
            assert tensor.std() == pytest.approx(0.1, rel=0.15)
    assert not torch.equal(first["embedding.weight"], first["head.weight"])
    assert len({name_seed(7, name) for name in SHAPES}) == len(SHAPES)


@given(name=st.sampled_from(sorted(SHAPES)), size=st.sampled_from([1, 2, 4]), gated=st.booleans())
def test_unshard_inverts_shard(name: str, size: int, gated: bool) -> None:
    full = torch.arange(torch.Size(SHAPES[name]).numel()).view(SHAPES[name])
    parts = [shard(full, name, size=size, rank=rank, gated=gated) for rank in range(size)]
    assert all(part.shape == local_shape(name, size) for part in parts)
    assert torch.equal(unshard(parts, name, gated=gated), full)


def test_gated_shard_holds_its_rows_of_gate_and_up() -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    full = torch.arange(8)[:, None]
    parts = {
        gated: [
            shard(full, name, size=2, rank=rank, gated=gated).flatten().tolist() for rank in (0, 1)
        ]
        for gated in (True, False)
    }
    assert parts[True] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert parts[False] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_fused_norms_have_their_own_names() -> None:
    layer = "decoder.layers.3."
    fused = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    }
    for name, plain in fused.items():
        assert canonical_name(layer + name) == layer + plain
    assert partition_dim(canonical_name(layer + "mlp.linear_fc1.layer_norm_weight")) is None
    assert is_norm("resampler.layers.0.norm_mlp.weight")
    assert not is_norm("decoder.layers.0.mlp.linear_fc1.weight")
