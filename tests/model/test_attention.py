"""Packed attention equals a loop over the segments, whatever their lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_mega.model.attention import SDPACoreAttention, SegmentedParams, segmented_params
from ghostvis_mega.model.context import WHOLE, ContextSlice
from ghostvis_mega.model.megatron import BlockLayout, transformer_config
from tests.model.llm_cases import llm_config

HEADS, GROUPS, DIM = 4, 2, 8
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def core_attention() -> SDPACoreAttention:
    config = transformer_config(
        llm_config(), layout=BlockLayout(), dtype=torch.float32, backend="cpu"
    )
    return SDPACoreAttention(config)


def describe(lengths: list[int], ctx: ContextSlice = WHOLE) -> SegmentedParams:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return segmented_params(ends, max_seqlen=max(lengths), for_sdpa=True, context=ctx)


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


class OneOfTwo(SDPACoreAttention):
    """Attention of one context-parallel rank; the other ranks' keys and values are at hand."""

    def __init__(self, ctx: ContextSlice, joined: tuple[torch.Tensor, torch.Tensor]):
        super().__init__(
            transformer_config(
                llm_config(), layout=BlockLayout(), dtype=torch.float32, backend="cpu"
            )
        )
        self.context, self.joined = ctx, joined

    def gather_context(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.joined


def over_ranks(
    qkv: list[torch.Tensor], lengths: list[int], *, size: int, packed: bool
) -> torch.Tensor:
    """Attention of all ranks, each on its own queries, put together again."""
    rows = [torch.from_numpy(ContextSlice(size, rank).rows(lengths)) for rank in range(size)]
    joined = tuple(torch.cat([x[own] for own in rows]) for x in qkv[1:])
    parts = []
    for rank, own in enumerate(rows):
        ctx = ContextSlice(size, rank)
        params = describe(lengths, ctx) if packed else None
        parts.append(OneOfTwo(ctx, joined)(*(x[own] for x in qkv), packed_seq_params=params))
    return torch.cat(parts)[torch.cat(rows).argsort()]


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 4),
    units=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 100),
)
def test_context_parallel_ranks_together_equal_loop_over_segments(
    size: int, units: list[int], seed: int
) -> None:
    lengths = [2 * size * unit for unit in units]
    qkv = random_qkv(sum(lengths), seed)
    mine, expected = over_ranks(qkv, lengths, size=size, packed=True), loop(qkv, lengths)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
    # Summed over the ranks' queries, as the backward of the real gather does.
    one = torch.autograd.grad((mine * weights).sum(), qkv)
    other = torch.autograd.grad((expected * weights).sum(), qkv)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_context_parallel_rows_without_packing() -> None:
    rows = [random_qkv(12, seed) for seed in (1, 2)]
    qkv = [torch.stack(parts, dim=1) for parts in zip(*rows, strict=True)]
    out_SBF = over_ranks(qkv, [12], size=3, packed=False)
    for row, one in enumerate(rows):
        torch.testing.assert_close(out_SBF[:, row], plain_attention(*one), rtol=1e-5, atol=1e-5)


def test_keys_of_another_order_differ() -> None:
    lengths = [8, 12]
    qkv = random_qkv(20, 3)
    rows = torch.from_numpy(ContextSlice(2, 0).rows(lengths))
    # In sequence order, not joined rank by rank.
    wrong = OneOfTwo(ContextSlice(2, 0), tuple(qkv[1:]))
    params = describe(lengths, ContextSlice(2, 0))
    out = wrong(*(x[rows] for x in qkv), packed_seq_params=params)
    assert (out - loop(qkv, lengths)[rows]).abs().max() > 0.01
