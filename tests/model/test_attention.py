"""Packed attention equals a loop over the segments, whatever their lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_mega.model.attention import SDPACoreAttention, SegmentedParams, segmented_params
from ghostvis_mega.model.megatron import BlockLayout, transformer_config
from tests.model.llm_cases import llm_config

HEADS, GROUPS, DIM = 4, 2, 8
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def core_attention() -> SDPACoreAttention:
    config = transformer_config(
        llm_config(), layout=BlockLayout(), dtype=torch.float32, backend="cpu"
    )
    return SDPACoreAttention(config)


def describe(lengths: list[int]) -> SegmentedParams:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return segmented_params(ends, max_seqlen=max(lengths), for_sdpa=True)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one segment, written out: [T, A, D] and twice [T, G, D] -> [T, A*D]."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("iad,jad->aij", q, k) / DIM**0.5
    hidden = torch.ones(len(q), len(q)).triu(1).bool()
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("aij,jad->iad", weights, v).flatten(1)


def random_qkv(total: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(total, heads, DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def loop(qkv: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    parts = zip(*(x.split(lengths) for x in qkv), strict=True)
    return torch.cat([plain_attention(*part) for part in parts])


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_packed_equals_loop_over_segments(lengths: list[int], seed: int) -> None:
    qkv = random_qkv(sum(lengths), seed)
    packed = core_attention()(*qkv, packed_seq_params=describe(lengths))
    expected = loop(qkv, lengths)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(seed + 1))
    mine = torch.autograd.grad((packed * weights).sum(), qkv)
    theirs = torch.autograd.grad((expected * weights).sum(), qkv)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [1, 33, 1], [5, 0, 3]])
def test_segments_of_one_token_and_none(lengths: list[int]) -> None:
    qkv = random_qkv(sum(lengths), 3)
    packed = core_attention()(*qkv, packed_seq_params=describe(lengths))
    torch.testing.assert_close(packed, loop(qkv, lengths), rtol=1e-5, atol=1e-5)


def test_shifted_boundary_differs() -> None:
    lengths = [7, 5, 9]
    qkv = random_qkv(sum(lengths), 3)
    packed = core_attention()(*qkv, packed_seq_params=describe([8, 4, 9]))
    assert (packed - loop(qkv, lengths)).abs().max() > 0.01


def test_unpacked_rows_equal_plain_attention() -> None:
    rows = [random_qkv(11, seed) for seed in (1, 2)]
    q, k, v = (torch.stack(parts, dim=1) for parts in zip(*rows, strict=True))
    out_SBF = core_attention()(q, k, v)
    for row, qkv in enumerate(rows):
        torch.testing.assert_close(out_SBF[:, row], plain_attention(*qkv), rtol=1e-5, atol=1e-5)


@given(lengths=LENGTHS)
@settings(max_examples=60, deadline=None)
def test_padding_stays_below_half(lengths: list[int]) -> None:
    places = sum(bucket.gather_NL.numel() for bucket in describe(lengths).buckets)
    assert sum(lengths) <= places < 2 * sum(lengths)
