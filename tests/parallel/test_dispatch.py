"""Every picture is encoded once, loads are even, and each replica gets all it shows."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_mega.data.order import hash_u64
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


EQUAL_COSTS = "ff7475727f14b7bfd1b9fa4d4c433bc5554fb320c1f7b168f9c7de8549964187"
"""SHA-256 of the dispatches below when pictures cost the same: another would change which rank
decodes what in runs that resume."""


def dispatches(*, patches: int | None, shift: int = 0) -> str:
    """A hash of 200 dispatches of integer noise."""
    digest = hashlib.sha256()
    for seed in range(200):
        noise = hash_u64(np.arange(64), seed).astype(np.int64) & 0xFFFF
        data, pipeline, tensor = (1 + int(value) % 4 for value in noise[:3])
        wanted = [
            [int(v) % 97 for v in hash_u64(np.arange(int(noise[3 + r]) % 60), seed, r)]
            for r in range(data)
        ]
        places = grid(data=data, pipeline=pipeline, tensor=tensor)
        costs = None
        if patches is not None:
            costs = {image: patches + shift * (image % 2) for ids in wanted for image in ids}
        done = dispatch_images(wanted, places, patches=costs)
        digest.update(repr((done.encode, done.wanted)).encode())
    return digest.hexdigest()


def test_equal_costs_are_dispatched_as_they_always_were() -> None:
    assert dispatches(patches=None) == EQUAL_COSTS
    assert dispatches(patches=576) == EQUAL_COSTS
    # Negative control: unequal ones are not.
    assert dispatches(patches=576, shift=1) != EQUAL_COSTS


@given(batches(), st.integers(0, 2**32))
def test_no_rank_bears_more_than_the_mean_and_a_picture(
    batch: tuple[list[list[int]], list[Place]], seed: int
) -> None:
    wanted, places = batch
    costs = {image: 1 + int(hash_u64(np.array([image]), seed)[0] % 4096) for image in range(61)}
    dispatch = dispatch_images(wanted, places, patches=costs)
    distinct = sorted({image for ids in wanted for image in ids})
    assert sorted(image for ids in dispatch.encode for image in ids) == distinct
    loads = [sum(costs[image] for image in ids) for ids in dispatch.encode]
    assert dispatch.loads == loads
    mean = sum(loads) / len(loads)
    assert max(loads) <= mean + max((costs[image] for image in distinct), default=0)
    # A rank above the mean was the least loaded one before its last picture came.
    for load, ids in zip(loads, dispatch.encode, strict=True):
        if load > mean:
            assert load - min(costs[image] for image in ids) <= mean


def test_pictures_of_many_sizes_are_balanced_by_patches_and_not_by_number() -> None:
    # One half large, one half small, each on one replica.
    wanted = [list(range(64)), list(range(64, 128))]
    costs = {image: 4000 if image < 64 else 400 for image in range(128)}
    places = grid(data=2, pipeline=1, tensor=4)
    dispatch = dispatch_images(wanted, places, patches=costs)
    assert dispatch.imbalance() < 1.02
    by_number = dispatch_images(wanted, places)
    assert ImageDispatch(by_number.encode, by_number.wanted, costs).imbalance() > 1.5
    assert by_number.imbalance() == 1.0


def test_a_rank_keeps_its_own_pictures_where_that_costs_no_balance() -> None:
    wanted = [[0, 1], [2, 3]]
    costs = {0: 30, 1: 10, 2: 20, 3: 20}
    dispatch = dispatch_images(wanted, grid(data=2, pipeline=1, tensor=1), patches=costs)
    assert dispatch.encode == ((0, 1), (2, 3))
    # Picture 1 no longer fits where it is shown.
    uneven = dispatch_images(
        wanted, grid(data=2, pipeline=1, tensor=1), patches={**costs, 0: 40, 1: 20, 3: 10}
    )
    assert uneven.encode == ((0,), (1, 2, 3))


def test_65536_pictures_over_4096_ranks_take_less_than_a_second() -> None:
    places = grid(data=512, pipeline=2, tensor=4)
    ids = np.arange(65_536)
    costs = dict(zip(ids.tolist(), (200 + hash_u64(ids, 1) % 3900).tolist(), strict=True))
    wanted = [ids[data::512].tolist() for data in range(512)]
    began_s = time.process_time()
    dispatch = dispatch_images(wanted, places, patches=costs)
    assert time.process_time() - began_s < 1.0
    assert dispatch.imbalance() < 1.01
