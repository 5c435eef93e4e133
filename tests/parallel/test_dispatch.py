"""Every picture is encoded once, loads are even, and each replica gets all it shows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_mega.parallel.dispatch import ImageDispatch, dispatch_images
from ghostvis_mega.parallel.groups import Place


def grid(*, data: int, pipeline: int, tensor: int) -> list[Place]:
    """Coordinates in rank order: tensor fastest, then data, then pipeline."""
    return [
        Place(data=d, pipeline=p, tensor=t)
        for p in range(pipeline)
        for d in range(data)
        for t in range(tensor)
    ]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[Place]]:
    data, pipeline, tensor = (draw(st.integers(1, 4)) for _ in range(3))
    ids = st.lists(st.integers(0, 60), max_size=25)
    wanted = draw(st.lists(ids, min_size=data, max_size=data))
    return wanted, grid(data=data, pipeline=pipeline, tensor=tensor)


def problems(dispatch: ImageDispatch, wanted: list[list[int]], places: list[Place]) -> list[str]:
    """What is wrong with a dispatch."""
    found = []
    encoded = [image for ids in dispatch.encode for image in ids]
    distinct = sorted({image for ids in wanted for image in ids})
    if sorted(encoded) != distinct:
        found.append("not every picture is encoded exactly once")
    loads = [len(ids) for ids in dispatch.encode]
    if len(loads) != len(places) or max(loads) - min(loads) > 1:
        found.append("loads differ by more than one picture")
    if [list(ids) for ids in dispatch.wanted] != [sorted(set(ids)) for ids in wanted]:
        found.append("a replica does not get what it shows")
    if any(list(ids) != sorted(ids) for ids in dispatch.encode):
        found.append("ids do not ascend")
    return found


@given(batches())
def test_dispatch_is_complete_balanced_and_repeatable(
    batch: tuple[list[list[int]], list[Place]],
) -> None:
    wanted, places = batch
    dispatch = dispatch_images(wanted, places)
    assert problems(dispatch, wanted, places) == []
    assert dispatch.num_images == len({image for ids in wanted for image in ids})
    # What decides is which pictures a replica shows, not their order or number.
    again = [list(reversed(ids)) + ids[:1] for ids in wanted]
    assert dispatch_images(again, places) == dispatch


@pytest.mark.parametrize(
    ("encode", "wanted", "problem"),
    [
        (((1, 2), (2, 3)), ((1, 2), (3,)), "not every picture is encoded exactly once"),
        (((1,), (2,)), ((1, 2), (3,)), "not every picture is encoded exactly once"),
        (((1, 2, 3), ()), ((1, 2), (3,)), "loads differ by more than one picture"),
        (((1, 2), (3,)), ((1, 2), ()), "a replica does not get what it shows"),
        (((2, 1), (3,)), ((1, 2), (3,)), "ids do not ascend"),
    ],
)
def test_faulty_dispatch_is_seen(encode: tuple, wanted: tuple, problem: str) -> None:
    places = grid(data=2, pipeline=1, tensor=1)
    faulty = ImageDispatch(encode=encode, wanted=wanted)
    assert problem in problems(faulty, [[1, 2], [3]], places)


def test_ties_go_to_a_rank_that_shows_the_picture() -> None:
    places = grid(data=2, pipeline=2, tensor=1)
    dispatch = dispatch_images([[1, 5], [0, 4]], places)
    # Then to the later stage, whose ranks have nothing yet.
    assert dispatch.encode == ((1,), (0,), (4,), (5,))
    assert dispatch_images([[0, 4], [1, 5]], places).encode == ((0,), (1,), (4,), (5,))


def test_batch_without_pictures() -> None:
    places = grid(data=2, pipeline=2, tensor=1)
    dispatch = dispatch_images([[], []], places)
    assert dispatch == ImageDispatch(encode=((),) * 4, wanted=((), ()))
    assert (dispatch.num_images, dispatch.imbalance()) == (0, 0.0)


def test_imbalance_is_busiest_over_mean() -> None:
    places = grid(data=1, pipeline=1, tensor=4)
    dispatch = dispatch_images([[10, 11, 12, 13, 14]], places)
    assert [len(ids) for ids in dispatch.encode] == [2, 1, 1, 1]
    assert dispatch.imbalance() == pytest.approx(2 / 1.25)
