"""Each context-parallel rank is given the rows of a picture that lie in its chunks, no others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_mega.data.batch import SequenceLayout
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.image_rows import image_rows

TOKENS = 5


@st.composite
def replicas(draw: st.DrawFn) -> tuple[list[list[SequenceLayout]], int]:
    size = draw(st.integers(2, 4))
    out = []
    for _ in range(draw(st.integers(1, 3))):
        sequences = []
        for _ in range(draw(st.integers(0, 3))):
            units = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
            segments = tuple(2 * size * unit for unit in units)
            room = sum(segments) // TOKENS
            images = draw(st.lists(st.integers(0, 3), max_size=min(room, 4)))
            free = sum(segments) - TOKENS * len(images)
            gaps = sorted(
                draw(st.lists(st.integers(0, free), min_size=len(images), max_size=len(images)))
            )
            starts = tuple(gap + TOKENS * number for number, gap in enumerate(gaps))
            sequences.append(SequenceLayout(segments, tuple(images), starts))
        out.append(sequences)
    return out, size


def chunk_owner(segments: tuple[int, ...], position: int, size: int) -> int:
    """The rank of a position: chunks r and 2 * size - 1 - r of each segment belong to rank r."""
    start = 0
    for length in segments:
        if position < start + length:
            chunk = (position - start) // (length // (2 * size))
            return chunk if chunk < size else 2 * size - 1 - chunk
        start += length
    raise AssertionError("outside of the sequence")


def expected(
    layouts: list[list[SequenceLayout]], size: int
) -> dict[tuple[int, int, int], list[int]]:
    """Rows by (data, context, image), position by position."""
    found: dict[tuple[int, int, int], set[int]] = {}
    for data, sequences in enumerate(layouts):
        for layout in sequences:
            for image, start in zip(layout.image_ids, layout.image_starts, strict=True):
                for row in range(TOKENS):
                    rank = chunk_owner(layout.segments, start + row, size)
                    found.setdefault((data, rank, image), set()).add(row)
    return {key: sorted(rows) for key, rows in found.items()}


@given(replicas())
def test_rows_are_those_of_the_ranks_chunks(
    case: tuple[list[list[SequenceLayout]], int],
) -> None:
    layouts, size = case
    rows = image_rows(layouts, tokens_per_image=TOKENS, context=size)
    found = {
        (data, rank, image): own.tolist()
        for data in range(len(layouts))
        for rank in range(size)
        for image, own in rows.of(Place(data=data, pipeline=0, tensor=0, context=rank)).items()
    }
    assert found == expected(layouts, size)


def test_a_picture_shown_twice_is_the_union_of_both_places() -> None:
    # Of the first place rank 0 shows rows 0 to 2, of the second rows 3 and 4.
    layout = SequenceLayout(segments=(12, 12), image_ids=(7, 7), image_starts=(0, 18))
    rows = image_rows([[layout]], tokens_per_image=TOKENS, context=2)
    first, second = rows.needed[0]
    assert first[7].tolist() == [0, 1, 2, 3, 4]
    assert second[7].tolist() == [0, 1, 2, 3, 4]
    once = SequenceLayout(segments=(12, 12), image_ids=(7,), image_starts=(0,))
    first, second = image_rows([[once]], tokens_per_image=TOKENS, context=2).needed[0]
    assert (first[7].tolist(), second[7].tolist()) == ([0, 1, 2], [3, 4])
    assert first[7].dtype == np.int64 and first[7].flags.c_contiguous


def test_other_boundaries_give_other_rows() -> None:
    here = SequenceLayout(segments=(12, 12), image_ids=(7,), image_starts=(0,))
    there = SequenceLayout(segments=(20, 4), image_ids=(7,), image_starts=(0,))
    one, other = (image_rows([[x]], tokens_per_image=TOKENS, context=2) for x in (here, there))
    assert one.needed[0][0][7].tolist() != other.needed[0][0][7].tolist()
    assert 7 not in other.needed[0][1]
