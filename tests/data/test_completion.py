"""Held units: short, of many sizes, placed once, and packs end full."""

import numpy as np
import pytest

from ghostvis_mega.data.completion import HELD_SHARE, complete, hold_back
from ghostvis_mega.data.order import hash_u64

CAPACITY = 1024


def _sizes(count: int, seed: int, longest: int) -> np.ndarray:
    """Descending, with many short ones."""
    noise = hash_u64(np.arange(2 * count), seed).astype(np.int64) & 0xFFFF
    return -np.sort(-(9 + noise[:count] % longest * (noise[count:] % 89) // 88))


def test_a_fifth_waits_and_all_of_it_is_short() -> None:
    sizes = _sizes(20_000, 1, 300)
    held = hold_back(sizes, np.arange(len(sizes)), capacity=CAPACITY, seed=0)
    assert sizes[held].max() <= CAPACITY // 8 < sizes.max()
    assert sizes[held].sum() / sizes.sum() <= HELD_SHARE + 0.01
    assert len(np.unique(sizes[held])) > 50
    other = hold_back(sizes, np.arange(len(sizes)), capacity=CAPACITY, seed=1)
    assert not np.array_equal(held, other)
    long = np.full(50, CAPACITY // 2)
    assert not hold_back(long, np.arange(50), capacity=CAPACITY, seed=0).any()


@pytest.mark.parametrize("seed", range(6))
def test_packs_end_full_and_every_unit_is_placed_once(seed: int) -> None:
    sizes = _sizes(3000, seed, 90)
    packs = int(sizes.sum()) // 200
    # Free space that the units fit into, but uneven.
    free = 150 + hash_u64(np.arange(packs), seed).astype(np.int64) % 101
    loads = CAPACITY - free
    where, after = complete(loads, sizes, capacity=CAPACITY, seed=seed)
    placed = where >= 0
    expected = loads + np.bincount(where[placed], weights=sizes[placed], minlength=packs)
    assert np.array_equal(after, expected.astype(np.int64))
    assert after.max() <= CAPACITY
    full = np.sort(after)[packs // 20 :]  # the last packs get what is left
    assert (full > CAPACITY - 8).all()
    assert (full == CAPACITY).mean() > 0.9
    again, _ = complete(loads, sizes, capacity=CAPACITY, seed=seed)
    assert np.array_equal(where, again)


def test_nothing_to_place_or_no_room() -> None:
    loads = np.array([CAPACITY, CAPACITY - 5])
    where, after = complete(loads, np.array([9, 7, 6]), capacity=CAPACITY, seed=0)
    assert where.tolist() == [-1, -1, -1]
    assert np.array_equal(after, loads)
    where, after = complete(loads, np.zeros(0, dtype=np.int64), capacity=CAPACITY, seed=0)
    assert len(where) == 0
    assert np.array_equal(after, loads)


def test_two_units_of_one_size_make_a_pair_only_if_there_are_two() -> None:
    loads = np.array([CAPACITY - 20, CAPACITY - 20])
    where, after = complete(loads, np.array([10, 10, 10]), capacity=CAPACITY, seed=0)
    assert sorted(where.tolist()) == [0, 0, 1]
    assert sorted(after.tolist()) == [CAPACITY - 10, CAPACITY]
