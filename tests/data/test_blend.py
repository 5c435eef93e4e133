"""Blending: against a brute-force count, at any step, with weights that change."""

import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data.blend import LONGEST_CYCLE, BlendOrder, BlendWeights, Phase, quotas
from ghostvis_mega.data.corpus import Corpus
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.order import hash_u64
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.perf.synthetic_data import write_synthetic
from ghostvis_mega.utils.errors import ConfigError, DataError

SIZES = (300, 120, 40)


def _write(path: Path, count: int, *, seed: int, images: int = 0, tokenizer: bytes = b"t") -> None:
    noise = hash_u64(np.arange(count), seed).astype(np.int64) & 0xFFFF
    write_synthetic(
        path,
        text_lengths=8 + noise % 50,
        image_of=noise % images if images else np.full(count, -1),
        pictures=[(b"%d/%d" % (seed, number), 4, 4) for number in range(images)],
        seed=seed,
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Datasets with 30, 0 and 7 pictures."""
    folder = tmp_path_factory.mktemp("blend")
    for number, (count, images) in enumerate(zip(SIZES, (30, 0, 7), strict=True)):
        _write(folder / f"{number}.gvd", count, seed=number, images=images)
    return [Dataset.open(folder / f"{number}.gvd") for number in range(3)]


@pytest.fixture
def make(three: list[Dataset]) -> Callable[..., BatchSource]:
    def _make(
        changes: tuple = ((0, (5.0, 3.0, 2.0)),), unit: str = "packs", **settings: object
    ) -> BatchSource:
        fixed = {"seq_length": 128, "global_size": 8, "micro_size": 1, "data_parallel": 1}
        fixed |= {"packing": True, "tokens_per_image": 4, "seed": 1}
        blend = BlendWeights(unit=unit, changes=changes)  # type: ignore[arg-type]
        return BatchSource(three, **(fixed | settings), blend=blend)  # type: ignore[arg-type]

    return _make


def test_quotas_are_exact_where_a_cycle_can_hold_them() -> None:
    assert quotas([Fraction("0.8"), Fraction("0.2")]) == (4, 1)
    assert quotas([Fraction("80"), Fraction("20"), Fraction(0)]) == (4, 1, 0)
    assert quotas([Fraction("0.333"), Fraction("0.667")]) == (333, 667)
    rounded = quotas([Fraction(1, 3), Fraction("0.123456")])
    assert sum(rounded) == LONGEST_CYCLE
    assert abs(rounded[0] / LONGEST_CYCLE - (1 / 3) / (1 / 3 + 0.123456)) < 1 / LONGEST_CYCLE
    with pytest.raises(ConfigError, match=r"data.blend\[1\].weight is less than one sequence"):
        quotas([Fraction(1), Fraction("0.000012345")])


PHASES = [
    [Phase(0, (1,))],
    [Phase(0, (4, 1))],
    [Phase(0, (5, 3, 2)), Phase(37, (1, 0, 6)), Phase(208, (333, 1, 667))],
]


@pytest.mark.parametrize("phases", PHASES)
def test_places_count_up_by_one_for_each_source(phases: list[Phase]) -> None:
    """Brute force: walk the stream from its start."""
    order = BlendOrder(phases, seed=3)
    sources, places = order.locate(np.arange(5000))
    seen: Counter[int] = Counter()
    for number, (source, place) in enumerate(zip(sources.tolist(), places.tolist(), strict=True)):
        if number % 501 == 0:
            assert order.consumed(number).tolist() == [seen[k] for k in range(order.num_sources)]
        assert place == seen[source]
        seen[source] += 1
    some = np.array([0, 17, 36, 37, 38, 1234, 4999])
    again = order.locate(some)
    assert np.array_equal(again[0], sources[some])
    assert np.array_equal(again[1], places[some])


def test_shares_hold_in_every_cycle_and_nearly_at_every_place() -> None:
    shares = np.array([5, 3, 2])
    order = BlendOrder([Phase(0, (5, 3, 2))], seed=3)
    sources, _ = order.locate(np.arange(10_000))
    counts = np.eye(3, dtype=np.int64)[sources]
    assert (counts.reshape(-1, 10, 3).sum(axis=1) == shares).all()
    wanted = np.arange(1, 10_001)[:, None] * shares / 10
    assert np.abs(np.cumsum(counts, axis=0) - wanted).max() < 2
    first = {tuple(cycle) for cycle in sources.reshape(-1, 10).tolist()}
    assert len(first) > 20  # cycles are permuted, each by itself


def test_a_long_cycle_keeps_the_share_of_every_window() -> None:
    """A plain permutation of 10,000 places would stray by several per cent in 512."""
    order = BlendOrder([Phase(0, (3277, 819))], seed=0)
    sources, _ = order.locate(np.arange(8 * 4096))
    share = np.convolve(sources == 1, np.ones(512) / 512, mode="valid")
    assert np.abs(share - 819 / 4096).max() < 3 / 512


def test_a_far_step_costs_no_more_than_the_first(three: list[Dataset]) -> None:
    order = BlendOrder([Phase(0, (3277, 819)), Phase(512, (4, 1))], seed=0)
    spent = []
    for _ in range(5):
        began = time.process_time()
        order.locate(np.arange(512 * 10**6, 512 * (10**6 + 1)))
        spent.append(time.process_time() - began)
    assert min(spent) < 0.005


def test_each_dataset_passes_its_own_epochs(make: Callable[..., BatchSource]) -> None:
    source = make()
    packs = [plan.num_packs for plan in source.plans]
    seen: list[list[tuple[int, ...]]] = [[], [], []]
    for step in range(60):
        batch = source.global_batch(step)
        for row in batch.sequences:
            seen[source.corpus.dataset_of_sample(row.sample_ids[0])].append(row.sample_ids)
    assert [len(rows) for rows in seen] == [240, 144, 96]
    assert batch.epochs == tuple(source.order.consumed(59 * 8) // packs)
    for rows, count in zip(seen, packs, strict=True):
        assert max(Counter(rows).values()) - (len(rows) % count > 0) == len(rows) // count
        assert len(set(rows)) == min(count, len(rows))


def test_ids_of_datasets_do_not_meet(make: Callable[..., BatchSource]) -> None:
    source = make(((0, (1.0, 1.0, 1.0)),))
    corpus = source.corpus
    assert corpus.image_offsets.tolist() == [0, 30, 30, 37]
    assert corpus.sample_offsets.tolist() == [0, 300, 420, 460]
    assert corpus.image_bytes(0) == b"0/0"
    assert corpus.image_bytes(30) == b"2/0"
    samples: set[int] = set()
    images: set[int] = set()
    for step in range(45):
        batch = source.global_batch(step)
        for (row,) in batch.replicas[0]:
            found = source.micro_batch((row,))
            assert tuple(slot.image_id for slot in found.images) == row.image_ids
            assert found.weights_BS.sum() == row.trained_tokens
            owners = {corpus.dataset_of_sample(index) for index in row.sample_ids}
            assert len(owners) == 1
            assert {corpus.dataset_of_image(i) for i in row.image_ids} <= owners
            samples |= set(row.sample_ids)
            images |= set(row.image_ids)
    assert samples == set(range(460))
    assert images == set(range(37))


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_weights_over_samples_and_tokens(make: Callable[..., BatchSource], unit: str) -> None:
    source = make(((0, (0.5, 0.3, 0.2)),), unit)
    found = np.zeros(3)
    for step in range(400):
        for row in source.global_batch(step).sequences:
            owner = source.corpus.dataset_of_sample(row.sample_ids[0])
            found[owner] += len(row.sample_ids) if unit == "samples" else row.num_tokens
    assert np.abs(found / found.sum() - [0.5, 0.3, 0.2]).max() < 0.005


def test_weights_change_without_replay(make: Callable[..., BatchSource]) -> None:
    plain = make(((0, (5.0, 3.0, 2.0)),))
    changed = make(((0, (5.0, 3.0, 2.0)), (13, (0.0, 1.0, 3.0))))
    before, after = 13, 40
    for step in range(before):
        assert plain.global_batch(step) == changed.global_batch(step)
    rows = [row for k in range(before, after) for row in changed.global_batch(k).sequences]
    owners = Counter(changed.corpus.dataset_of_sample(row.sample_ids[0]) for row in rows)
    assert owners == {1: 8 * (after - before) // 4, 2: 8 * (after - before) * 3 // 4}
    start = plain.order.consumed(before * 8)
    assert np.array_equal(changed.order.consumed(before * 8), start)
    whole = start + [0, owners[1], owners[2]]
    assert np.array_equal(changed.order.consumed(after * 8), whole)


@pytest.mark.parametrize("data_parallel", [2, 4, 8])
def test_the_set_of_a_step_does_not_depend_on_data_parallel(
    make: Callable[..., BatchSource], data_parallel: int
) -> None:
    for step in range(6):
        one = make().global_batch(step)
        many = make(data_parallel=data_parallel).global_batch(step)
        assert Counter(one.sequences) == Counter(many.sequences)


def test_different_tokenizers_are_refused(three: list[Dataset], tmp_path: Path) -> None:
    _write(tmp_path / "other.gvd", 20, seed=9, tokenizer=b"another")
    with pytest.raises(DataError, match=r"other.gvd was tokenised with another tokenizer"):
        Corpus([three[0], Dataset.open(tmp_path / "other.gvd")])
