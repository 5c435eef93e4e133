"""Zigzag slices against their definition, written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.model.context import ContextSlice, gathered_places, row_owners
from ghostvis_mega.model.inputs import model_input

CPU = torch.device("cpu")


def chunks_of(lengths: list[int], *, size: int, rank: int) -> list[int]:
    """Chunk `rank` and chunk `2 * size - 1 - rank` of every segment, in that order."""
    rows, start = [], 0
    for length in lengths:
        whole = list(range(start, start + length))
        width = length // (2 * size)
        for chunk in (rank, 2 * size - 1 - rank):
            rows += whole[chunk * width : (chunk + 1) * width]
        start += length
    return rows


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int]:
    size = draw(st.integers(1, 5))
    units = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    return [2 * size * unit for unit in units], size


@given(cuts())
def test_slices_are_the_two_chunks_of_each_segment(cut: tuple[list[int], int]) -> None:
    lengths, size = cut
    ranks = [ContextSlice(size, rank).rows(lengths).tolist() for rank in range(size)]
    if size > 1:
        assert ranks == [chunks_of(lengths, size=size, rank=rank) for rank in range(size)]
    assert sorted(row for rows in ranks for row in rows) == list(range(sum(lengths)))
    joined = torch.tensor([row for rows in ranks for row in rows], dtype=torch.int64)
    places = gathered_places(lengths, size=size)
    assert joined[places].tolist() == list(range(sum(lengths)))


def test_another_chunk_would_be_seen() -> None:
    assert ContextSlice(2, 0).rows([8, 4]).tolist() == [0, 1, 6, 7, 8, 11]
    assert chunks_of([8, 4], size=2, rank=1) == [2, 3, 4, 5, 9, 10]
    assert row_owners([4], size=2).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("lengths", [[8, 6], [3], [4, 4, 2]])
def test_a_segment_that_cannot_be_cut_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        row_owners(lengths, size=2)
    assert len(row_owners(lengths, size=1)) == sum(lengths)


def packed_batch() -> MicroBatch:
    """Segments of 8 and 12; a picture of 4 rows over the first cut, another in one chunk."""
    length = 20
    return MicroBatch(
        tokens_BS=torch.arange(100, 100 + length)[None],
        labels_BS=torch.arange(200, 200 + length)[None],
        weights_BS=(torch.arange(length) % 3 != 0).float()[None],
        positions_BS=torch.cat([torch.arange(8), torch.arange(12)])[None],
        cu_seqlens=torch.tensor([0, 8, 20], dtype=torch.int32),
        max_seqlen=12,
        images=(ImageSlot(7, 0, 1), ImageSlot(9, 0, 13)),
        sample_ids=(0, 1),
    )


def test_a_packed_input_is_cut_with_labels_weights_and_pictures() -> None:
    batch = packed_batch()
    seen, pictures = [], {7: [], 9: []}
    for rank in (0, 1):
        ctx = ContextSlice(2, rank)
        cut = model_input(batch, tokens_per_image=4, device=CPU, for_sdpa=True, context=ctx)
        rows = cut.rows_S
        assert rows.tolist() == chunks_of([8, 12], size=2, rank=rank)
        assert torch.equal(cut.tokens_BS, batch.tokens_BS[:, rows])
        assert torch.equal(cut.positions_BW, batch.positions_BS)
        trained = rows[cut.trained_rows]
        assert torch.equal(cut.labels_R, batch.labels_BS[0, trained])
        assert cut.weights_R.eq(1).all()
        seen += trained.tolist()
        # What stands at an image row is the place in the sequence that its slot row means.
        parts = [
            (slot, row)
            for slot, own in zip(batch.images, cut.slot_rows, strict=True)
            for row in own.tolist()
        ]
        for (slot, row), place in zip(parts, cut.image_rows.tolist(), strict=True):
            assert rows[place] == slot.start + row
            pictures[slot.image_id].append(row)
        assert cut.shows_images
    assert sorted(seen) == batch.weights_BS[0].nonzero().flatten().tolist()
    assert {image: sorted(rows) for image, rows in pictures.items()} == dict.fromkeys(
        (7, 9), [0, 1, 2, 3]
    )


def test_the_ring_is_told_whole_segments_without_padding_between_them() -> None:
    cut = model_input(
        packed_batch(), tokens_per_image=4, device=CPU, for_sdpa=False, context=ContextSlice(2, 1)
    )
    assert cut.packed.cu_seqlens_q.tolist() == [0, 8, 20]
    # The very same tensor: Transformer Engine takes another one for a sign of padding.
    assert cut.packed.cu_seqlens_q_padded is cut.packed.cu_seqlens_q
    assert cut.packed.cu_seqlens_kv_padded is cut.packed.cu_seqlens_kv
    assert (cut.packed.max_seqlen_q, cut.packed.buckets) == (12, [])
    whole = model_input(packed_batch(), tokens_per_image=4, device=CPU, for_sdpa=False)
    assert whole.packed.cu_seqlens_q_padded is None


def test_unpacked_rows_are_cut_alike() -> None:
    tokens = torch.arange(16).view(2, 8)
    batch = MicroBatch(
        tokens_BS=tokens,
        labels_BS=tokens + 50,
        weights_BS=torch.ones(2, 8),
        positions_BS=torch.arange(8).expand(2, 8),
        cu_seqlens=None,
        max_seqlen=8,
        images=(ImageSlot(3, 1, 1),),
        sample_ids=(0, 1),
    )
    first, second = (
        model_input(
            batch, tokens_per_image=2, device=CPU, for_sdpa=True, context=ContextSlice(2, rank)
        )
        for rank in (0, 1)
    )
    assert first.tokens_BS.tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    # Flat positions count s * 2 + row.
    assert first.labels_R.tolist() == [50, 58, 51, 59, 56, 64, 57, 65]
    assert (first.image_rows.tolist(), first.slot_rows[0].tolist()) == ([3], [0])
    assert (second.image_rows.tolist(), second.slot_rows[0].tolist()) == ([1], [1])


def test_one_rank_alone_gets_everything() -> None:
    whole = model_input(packed_batch(), tokens_per_image=4, device=CPU, for_sdpa=True)
    assert whole.slot_rows == (None, None)
    assert whole.image_rows.tolist() == [1, 2, 3, 4, 13, 14, 15, 16]
    assert whole.rows_S.tolist() == list(range(20))
