"""The array packers give what the sample-by-sample ones give, to the last place."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data import packing
from ghostvis_mega.data.order import hash_u64
from ghostvis_mega.data.packing import Ragged, make_units, pack_balanced, pack_bfd

_spec = importlib.util.spec_from_file_location(
    "packing_reference", Path(__file__).with_name("packing_reference.py")
)
assert _spec is not None and _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def _draw(count: int, seed: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths with many short ones, and groups of 1 to hundreds of samples."""
    noise = hash_u64(np.arange(2 * count), seed).astype(np.int64) & 0xFFFF
    lengths = 1 + (noise[:count] % longest) * (noise[count:] % 97) // 96
    return lengths, np.sort(noise[count:] % max(1, count // 7)) // (1 + noise[:count] % 3)


CASES = [
    (1, 0, 50, 64),
    (40, 1, 60, 64),
    (3000, 2, 500, 512),
    (9000, 3, 60, 64),
    (500, 4, 512, 512),
]


@pytest.mark.parametrize(("count", "seed", "longest", "capacity"), CASES)
@pytest.mark.parametrize("buckets_from", [0, 10**9])
def test_equal_to_the_reference(
    count: int,
    seed: int,
    longest: int,
    capacity: int,
    buckets_from: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "_BUCKETS_FROM", buckets_from)  # all buckets, or the heap only
    lengths, groups = _draw(count, seed, longest)
    limit = capacity // 4
    units = make_units(lengths, groups, limit=limit, seed=seed)
    slow = reference.make_units(lengths, groups, limit=limit, seed=seed)
    assert units.lists() == slow
    fast = pack_balanced(lengths, units, capacity=capacity, seed=seed)
    assert fast.lists() == reference.pack_balanced(lengths, slow, capacity=capacity, seed=seed)
    alone = pack_balanced(lengths, Ragged.singles(np.arange(count)), capacity=capacity, seed=seed)
    singles = [[sample] for sample in range(count)]
    assert alone.lists() == reference.pack_balanced(lengths, singles, capacity=capacity, seed=seed)
    best = pack_bfd(lengths, np.arange(count), capacity=capacity, seed=seed)
    assert best.lists() == reference.pack_bfd(
        lengths, np.arange(count), capacity=capacity, seed=seed
    )
    if count > 100:  # negative control: another order of equal units is another result
        other = pack_balanced(lengths, units, capacity=capacity, seed=seed + 1)
        assert other.lists() != fast.lists()
        assert any(len(unit) > 1 for unit in slow) and max(map(len, slow)) < count


def test_where_holding_back_saves_no_pack_nothing_is_held_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearly equal lengths do not add up to what is left, however they are chosen."""
    lengths = 40 + hash_u64(np.arange(2000), 6).astype(np.int64) % 8
    singles = Ragged.singles(np.arange(2000))
    found = pack_balanced(lengths, singles, capacity=1024, seed=0).lists()
    alone = [[sample] for sample in range(2000)]
    assert found == reference.pack_balanced(lengths, alone, capacity=1024, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "hold_back", lambda sizes, *_, **__: np.zeros(len(sizes), bool))
        patch.setattr(packing, "SLACK", packing.PLAIN_SLACK)
        assert found == pack_balanced(lengths, singles, capacity=1024, seed=0).lists()
    monkeypatch.setattr(packing, "PLAIN_SLACK", 1.0)  # never tried, since it begins with too many
    assert len(pack_balanced(lengths, singles, capacity=1024, seed=0)) >= len(found)
    assert found != pack_balanced(lengths, singles, capacity=1024, seed=0).lists()


def test_large_groups_take_their_own_path() -> None:
    lengths, _ = _draw(2000, 9, 30)
    groups = np.concatenate([np.zeros(700), np.ones(64), np.full(65, 2), np.arange(3, 1174)])
    groups = groups.astype(np.int64)
    units = make_units(lengths, groups, limit=100, seed=0)
    assert units.lists() == reference.make_units(lengths, groups, limit=100, seed=0)


def test_ragged_lists_go_there_and_back() -> None:
    lists = [[3, 1], [], [7], [2, 2, 2]]
    ragged = Ragged.of(lists)
    assert ragged.lists() == lists
    assert ragged.take(np.array([3, 0, 1])).lists() == [[2, 2, 2], [3, 1], []]
