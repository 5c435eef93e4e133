"""Packing: every sample once, nothing too long, alike packs, the same result every time."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.order import hash_u64, permute, shuffled
from ghostvis_mega.data.packing import (
    Ragged,
    make_units,
    pack_balanced,
    pack_bfd,
)
from ghostvis_mega.data.plan import (
    PLANNER_VERSION,
    PackPlan,
    PlanParams,
    build_plan,
    load_or_build,
    save_plan,
)
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import canonical_json

HASHES = [16886114407743784434, 16972977063473447543, 14985119172904803730]
PERMUTED = [6, 1, 7, 3, 0, 2, 5, 4]
SHUFFLED = [1, 2, 4, 5, 0, 3]
PARAMS = PlanParams(algorithm="balanced", seq_length=160, tokens_per_image=8, seed=3)


def _lengths(count: int, seed: int = 0) -> np.ndarray:
    """Log-normal lengths with a floor, as conversations have."""
    drawn = np.random.default_rng(seed).lognormal(5.0, 0.7, count)
    return np.clip(drawn, 20, 4096).astype(np.int64)


def _check(packs: list[list[int]], lengths: np.ndarray, capacity: int) -> None:
    placed = [sample for pack in packs for sample in pack]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(pack and lengths[pack].sum() <= capacity for pack in packs)


@pytest.mark.parametrize("count", [1, 2, 17, 3000])
def test_algorithms_place_every_sample_once(count: int) -> None:
    lengths = _lengths(count)
    units = make_units(lengths, np.arange(count) // 5, limit=1024, seed=0)
    _check(pack_balanced(lengths, units, capacity=4096, seed=0).lists(), lengths, 4096)
    _check(pack_bfd(lengths, np.arange(count), capacity=4096, seed=0).lists(), lengths, 4096)


def test_fill_and_balance_reach_the_bar() -> None:
    """The shape of the GhostVis mix: 80 % with one 64-token image, the rest longer chat."""
    generator = np.random.default_rng(1)
    text = np.clip(generator.lognormal(3.6, 0.6, 40_000), 10, 900)
    chat = np.clip(generator.lognormal(6.2, 0.7, 10_000), 40, 4096)
    lengths = np.concatenate([text + 64, chat]).astype(np.int64)
    images = np.arange(50_000) < 40_000
    units = Ragged.singles(np.arange(50_000))
    balanced = pack_balanced(lengths, units, capacity=4096, seed=0).lists()
    bfd = pack_bfd(lengths, np.arange(50_000), capacity=4096, seed=0).lists()
    bound = lengths.sum() / 4096
    assert bound / len(balanced) >= 0.998
    assert bound / len(bfd) >= 0.99
    spread = {
        name: np.array([images[pack].sum() for pack in packs])
        for name, packs in (("balanced", balanced), ("bfd", bfd))
    }
    assert spread["balanced"].std() <= 0.35 * spread["balanced"].mean()
    assert spread["bfd"].std() > spread["balanced"].std()


def test_units_stay_in_their_group_and_below_the_limit() -> None:
    lengths = _lengths(500)
    groups = np.arange(500) // 10
    units = make_units(lengths, groups, limit=1000, seed=0).lists()
    assert sorted(sample for unit in units for sample in unit) == list(range(500))
    for unit in units:
        assert len(set(groups[unit].tolist())) == 1
        assert len(unit) == 1 or lengths[unit].sum() <= 1000
    assert len(units) < 250


def _ids(plan: PackPlan) -> list[int]:
    return sorted([*plan.samples.tolist(), *plan.dropped.tolist()])


@pytest.mark.parametrize("algorithm", ["balanced", "bfd", "none"])
def test_plan_costs_match_the_samples(dataset: Dataset, algorithm: str) -> None:
    plan = build_plan(dataset, replace(PARAMS, algorithm=algorithm))
    assert _ids(plan) == list(range(dataset.num_samples))
    lengths = dataset.lengths(tokens_per_image=8)
    for number in range(plan.num_packs):
        samples = plan.pack(number)
        stored = [image for index in samples for image in dataset.sample(index).image_ids]
        assert plan.tokens[number] == lengths[samples].sum() <= 160
        assert plan.segments[number] == len(samples)
        assert plan.images[number] == len(stored)
        assert plan.distinct_images[number] == len(set(stored))
        assert plan.sumsq[number] == (lengths[samples] ** 2).sum()
    if algorithm == "none":
        assert plan.num_packs == len(plan.samples)


def test_grouping_saves_tower_work_without_losing_fill(dataset: Dataset) -> None:
    grouped = build_plan(dataset, replace(PARAMS, images_per_pack=2))
    loose = build_plan(dataset, replace(PARAMS, group_images=False))
    assert grouped.distinct_images.sum() < loose.distinct_images.sum()
    assert grouped.num_packs <= loose.num_packs + 1


def test_long_samples_are_left_out_and_counted(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = dataset.lengths(tokens_per_image=8)
    limit = int(np.median(lengths))
    plan = build_plan(dataset, replace(PARAMS, seq_length=limit))
    assert plan.dropped.tolist() == np.flatnonzero(lengths > limit).tolist() != []
    assert f"{len(plan.dropped)} of {dataset.num_samples} samples are longer" in caplog.text
    assert _ids(plan) == list(range(dataset.num_samples))


def test_impossible_plans_are_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="no sample .* fits into seq_length=5"):
        build_plan(dataset, replace(PARAMS, seq_length=5))
    with pytest.raises(DataError, match="holds images, but an image takes 0 positions"):
        build_plan(dataset, replace(PARAMS, tokens_per_image=0))


def test_stored_plan_equals_the_one_in_memory(dataset: Dataset, tmp_path: Path) -> None:
    plan = build_plan(dataset, PARAMS)
    again = build_plan(dataset, PARAMS)
    other = build_plan(dataset, replace(PARAMS, seed=4))
    assert plan.samples.tobytes() == again.samples.tobytes() != other.samples.tobytes()
    copy = tmp_path / "copy.gvd"
    copy.symlink_to(dataset.path)
    opened = Dataset.open(dataset.path)
    try:
        save_plan(opened, plan)
        loaded = load_or_build(opened, PARAMS)
        assert loaded.params == PARAMS
        for name in ("offsets", "samples", "dropped", "tokens", "segments", "images", "sumsq"):
            assert getattr(loaded, name).tobytes() == getattr(plan, name).tobytes()
        assert PARAMS.digest(opened) != replace(PARAMS, seq_length=161).digest(opened)
    finally:
        opened.close()


def test_plans_without_alignment_keep_their_names_and_bytes(dataset: Dataset) -> None:
    """The identity of a plan as it was before alignment existed."""
    identity = {
        "algorithm": "balanced", "seq_length": 160, "tokens_per_image": 8, "seed": 3,
        "group_images": True, "images_per_pack": 4,
    }  # fmt: skip
    assert PARAMS.document() == identity
    named = {**identity, "dataset": dataset.manifest.digest, "planner": PLANNER_VERSION}
    assert PARAMS.digest(dataset) == hashlib.sha256(canonical_json(named)).hexdigest()[:16]
    aligned = replace(PARAMS, segment_align=4)
    assert aligned.document() == {**identity, "segment_align": 4}
    assert aligned.digest(dataset) != PARAMS.digest(dataset)


@pytest.mark.parametrize("algorithm", ["balanced", "bfd", "none"])
def test_aligned_plans_leave_room_for_the_padding(dataset: Dataset, algorithm: str) -> None:
    params = replace(PARAMS, algorithm=algorithm, segment_align=16)
    plan = build_plan(dataset, params)
    assert _ids(plan) == list(range(dataset.num_samples))
    lengths = dataset.lengths(tokens_per_image=8)
    loose = build_plan(dataset, replace(params, segment_align=1))
    overfull = 0
    for each, aligned in ((plan, True), (loose, False)):
        for number in range(each.num_packs):
            padded = -(-lengths[each.pack(number)] // 16) * 16
            assert each.tokens[number] == lengths[each.pack(number)].sum()
            if aligned:
                assert padded.sum() <= 160
            overfull += int(padded.sum() > 160)
    assert (overfull > 0) == (algorithm != "none")  # negative control: unaligned plans do not fit
    if algorithm != "none":
        assert plan.num_packs > loose.num_packs
        padded = -(-lengths // 16) * 16
        squares = [int((padded[plan.pack(n)] ** 2).sum()) for n in range(plan.num_packs)]
        assert plan.sumsq.tolist() == squares


def test_an_aligned_plan_is_stored_and_read_again(dataset: Dataset) -> None:
    params = replace(PARAMS, segment_align=8, seed=11)
    directory = save_plan(dataset, build_plan(dataset, params))
    try:
        assert json.loads((directory / "plan.json").read_bytes())["params"]["segment_align"] == 8
        assert load_or_build(dataset, params).params == params
    finally:
        shutil.rmtree(directory)
    with pytest.raises(
        DataError, match=r"seq_length=160 is not a multiple of segment_align=7 .*use 154"
    ):
        build_plan(dataset, replace(PARAMS, segment_align=7))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_permute_is_a_bijection_that_differs_by_epoch(count: int) -> None:
    everything = np.arange(count)
    orders = [permute(everything, count=count, seed=5, epoch=epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == everything.tolist()
    one_by_one = [int(permute(np.array([i]), count=count, seed=5, epoch=2)[0]) for i in everything]
    assert one_by_one == orders[2].tolist()
    if count >= 7:
        assert len({tuple(order.tolist()) for order in orders}) == 4


def test_permute_spreads() -> None:
    """No visible order: neighbours are unrelated and no index prefers a place."""
    order = permute(np.arange(10_000), count=10_000, seed=0, epoch=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    first = [int(permute(np.array([0]), count=10, seed=s, epoch=0)[0]) for s in range(500)]
    assert np.bincount(first, minlength=10).min() > 25


def test_order_is_the_same_everywhere() -> None:
    """Golden values: an update that changes them would reshuffle running trainings."""
    assert hash_u64(np.arange(3), 7).tolist() == HASHES
    assert permute(np.arange(8), count=8, seed=1, epoch=2).tolist() == PERMUTED
    assert shuffled(6, 9).tolist() == SHUFFLED
