"""Batches: checked against a slow reference that reads samples one by one."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from ghostvis_mega.data.batch import GlobalBatch, ImageSlot, MicroBatch
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.source import BatchSource, balance
from ghostvis_mega.utils.errors import ConfigError, DataError

WIDTH = 8
LENGTH = 160


def _source(dataset: Dataset, **changes: object) -> BatchSource:
    settings = {
        "seq_length": LENGTH,
        "global_size": 8,
        "micro_size": 1,
        "data_parallel": 1,
        "packing": True,
        "tokens_per_image": WIDTH,
        "seed": 0,
    }
    return BatchSource(dataset, **{**settings, **changes})


def _expand(dataset: Dataset, index: int) -> tuple[list[int], list[bool], list[int], list[int]]:
    """Tokens, trained flags, image starts and image ids of a sample, by plain loops."""
    sample = dataset.sample(index)
    flags = [False] * len(sample.tokens)
    for start, length, _, train, _ in sample.spans.tolist():
        for place in range(start, start + length):
            flags[place] = bool(train)
    tokens, trained, starts = [], [], []
    for place, token in enumerate(sample.tokens.tolist()):
        copies = 1
        if place in sample.image_positions:
            starts.append(len(tokens))
            copies = WIDTH
        tokens += [token] * copies
        trained += [flags[place]] * copies
    return tokens, trained, starts, list(sample.image_ids)


def _reference(dataset: Dataset, rows: list[list[int]], packed: bool, align: int = 1) -> MicroBatch:
    """The micro-batch as its documentation describes it, position by position."""
    pad = dataset.tokenizer.specials["pad"]
    columns: list[list[list[float]]] = [[], [], [], []]
    cuts, slots = [0], []
    for number, samples in enumerate(rows):
        row: list[list[float]] = [[], [], [], []]
        for index in samples:
            tokens, trained, starts, image_ids = _expand(dataset, index)
            offset = len(row[0])
            for place in range(len(tokens)):
                inside = place + 1 < len(tokens)
                weight = inside and trained[place + 1]
                row[0].append(tokens[place])
                row[1].append(tokens[place + 1] if weight else 0)
                row[2].append(float(weight))
                row[3].append(place)
            slots += [
                ImageSlot(image_id, number, offset + start)
                for image_id, start in zip(image_ids, starts, strict=True)
            ]
            while packed and (len(row[0]) - offset) % align:
                for column, value in zip(row, (pad, 0, 0.0, len(row[0]) - offset), strict=True):
                    column.append(value)
            cuts.append(len(row[0]))
        tail = LENGTH - len(row[0])
        row[0] += [pad] * tail
        row[1] += [0] * tail
        row[2] += [0.0] * tail
        row[3] += range(tail)
        for column, values in zip(columns, row, strict=True):
            column.append(values)
    if cuts[-1] != LENGTH:
        cuts.append(LENGTH)
    longest = max(b - a for a, b in zip(cuts, cuts[1:], strict=False)) if packed else LENGTH
    return MicroBatch(
        tokens_BS=torch.tensor(columns[0], dtype=torch.int64),
        labels_BS=torch.tensor(columns[1], dtype=torch.int64),
        weights_BS=torch.tensor(columns[2], dtype=torch.float32),
        positions_BS=torch.tensor(columns[3], dtype=torch.int64),
        cu_seqlens=torch.tensor(cuts, dtype=torch.int32) if packed else None,
        max_seqlen=longest,
        images=tuple(slots),
        sample_ids=tuple(index for samples in rows for index in samples),
    )


def _differences(found: MicroBatch, expected: MicroBatch) -> list[str]:
    """Names of the fields that differ in value or dtype."""
    names = []
    for name in MicroBatch.__dataclass_fields__:
        a, b = getattr(found, name), getattr(expected, name)
        if isinstance(b, torch.Tensor):
            same = isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        else:
            same = a == b
        if not same:
            names.append(name)
    return names


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_match_the_reference(dataset: Dataset, packing: bool) -> None:
    source = _source(dataset, packing=packing, micro_size=1 if packing else 4)
    seen = 0
    for step in range(3):
        for replica in source.global_batch(step).replicas:
            for rows in replica:
                found = source.micro_batch(rows)
                samples = [list(row.sample_ids) for row in rows]
                assert _differences(found, _reference(dataset, samples, packing)) == []
                assert sum(row.trained_tokens for row in rows) == found.weights_BS.sum()
                useful = sum(row.num_tokens for row in rows)
                assert useful == sum(len(_expand(dataset, i)[0]) for s in samples for i in s)
                slots = tuple(slot.image_id for slot in found.images)
                assert slots == tuple(i for row in rows for i in row.image_ids)
                seen += len(slots)
    assert seen > 10


@pytest.mark.parametrize("align", [4, 16])
def test_aligned_samples_are_padded_inside_their_segments(dataset: Dataset, align: int) -> None:
    source = _source(dataset, segment_align=align)
    padded = 0
    for step in range(3):
        for (row,) in source.global_batch(step).replicas[0]:
            found = source.micro_batch((row,))
            samples = [list(row.sample_ids)]
            assert _differences(found, _reference(dataset, samples, True, align)) == []
            assert not (found.cu_seqlens % align).any() and found.max_seqlen % align == 0
            assert row.trained_tokens == found.weights_BS.sum()
            borders = found.cu_seqlens.tolist()
            whole = borders[len(row.sample_ids)]
            padded += whole - row.num_tokens
            # Negative control: without the padding inside it is another batch.
            if whole > row.num_tokens:
                assert "cu_seqlens" in _differences(found, _reference(dataset, samples, True))
    assert padded > 0
    planned = [sample for pack in range(source.plan.num_packs) for sample in source.plan.pack(pack)]
    assert sorted([*planned, *source.plan.dropped]) == list(range(dataset.num_samples))


def test_alignment_changes_nothing_without_packing(dataset: Dataset) -> None:
    aligned = _source(dataset, packing=False, micro_size=4, segment_align=8)
    plain = _source(dataset, packing=False, micro_size=4)
    for rows in aligned.global_batch(0).replicas[0]:
        assert _differences(aligned.micro_batch(rows), plain.micro_batch(rows)) == []


def test_a_sequence_that_cannot_be_aligned_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"seq_length=160 is not a multiple of segment_align=12"):
        _source(dataset, segment_align=12)


def test_image_slots_sit_on_image_tokens(dataset: Dataset) -> None:
    source = _source(dataset)
    image = dataset.tokenizer.specials["image"]
    batch = source.global_batch(1)
    for (row,) in batch.replicas[0]:
        found = source.micro_batch((row,))
        covered = torch.zeros_like(found.tokens_BS, dtype=torch.bool)
        for slot in found.images:
            covered[slot.row, slot.start : slot.start + WIDTH] = True
        assert torch.equal(covered, found.tokens_BS == image)


def test_the_reference_catches_a_shifted_boundary(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: let labels run over the end of a sample, or move anything by one."""
    source = _source(dataset)
    rows = next((row,) for (row,) in source.global_batch(0).replicas[0] if len(row.sample_ids) > 1)
    good = source.micro_batch(rows)
    expected = _reference(dataset, [list(rows[0].sample_ids)], True)
    assert _differences(good, expected) == []
    leaky = good.labels_BS.clone()
    boundary = int(good.cu_seqlens[1]) - 1
    leaky[0, boundary] = good.tokens_BS[0, boundary + 1]
    assert _differences(replace(good, labels_BS=leaky), expected) == ["labels_BS"]
    moved = good.cu_seqlens.clone()
    moved[1] += 1
    assert "cu_seqlens" in _differences(replace(good, cu_seqlens=moved), expected)

    # Train on everything: now only the boundary rule keeps labels inside their sample.
    real = Dataset.gather

    def all_trained(self: Dataset, indices: np.ndarray):  # noqa: ANN202
        gathered = real(self, indices)
        return replace(gathered, trained=np.ones_like(gathered.trained))

    monkeypatch.setattr(Dataset, "gather", all_trained)
    found = source.micro_batch(rows)
    ends = found.cu_seqlens[1:-1].long() - 1
    assert found.weights_BS[0, ends].sum() == 0
    assert found.weights_BS.sum() == rows[0].num_tokens - len(rows[0].sample_ids)


def _samples(batch: GlobalBatch) -> Counter[tuple[int, ...]]:
    return Counter(row.sample_ids for row in batch.sequences)


@pytest.mark.parametrize("packing", [True, False])
def test_each_sample_exactly_once_an_epoch(dataset: Dataset, packing: bool) -> None:
    source = _source(dataset, packing=packing)
    packs = source.plan.num_packs
    stream = []
    for step in range(3 * packs // 8 + 1):
        batch = source.global_batch(step)
        assert batch.epoch == step * 8 // packs
        assert len(batch.sequences) == 8  # full even where an epoch ends inside
        stream.append(batch)
    total = sum((_samples(batch) for batch in stream), Counter())
    assert sum(total.values()) == 8 * len(stream)
    # Three epochs and a bit: every pack three times, some a fourth.
    assert set(total.values()) <= {3, 4}
    assert len(total) == packs
    once = Counter(s for ids in total for s in ids)
    assert set(once.values()) == {1}
    assert len(once) + len(source.plan.dropped) == dataset.num_samples


@pytest.mark.parametrize("packing", [True, False])
def test_the_set_of_a_step_does_not_depend_on_data_parallel(
    dataset: Dataset, packing: bool
) -> None:
    sources = {dp: _source(dataset, data_parallel=dp, packing=packing) for dp in (1, 2, 4, 8)}
    for step in range(6):
        batches = {dp: source.global_batch(step) for dp, source in sources.items()}
        for dp, batch in batches.items():
            assert _samples(batch) == _samples(batches[1])
            assert len(batch.replicas) == dp
            assert {len(replica) for replica in batch.replicas} == {8 // dp}
            assert batch.image_ids == batches[1].image_ids
            assert batch.trained_tokens == batches[1].trained_tokens
            assert batch.num_tokens == batches[1].num_tokens
            assert batch.num_samples == batches[1].num_samples
    other = _source(dataset, seed=1).global_batch(0)
    assert _samples(other) != _samples(sources[1].global_batch(0))


def test_every_epoch_has_its_own_order(dataset: Dataset) -> None:
    source = _source(dataset, global_size=1)
    packs = source.plan.num_packs
    stream = [source.global_batch(step).sequences[0].sample_ids for step in range(4 * packs)]
    epochs = [tuple(stream[start : start + packs]) for start in range(0, 4 * packs, packs)]
    assert len(set(epochs)) == 4
    assert {frozenset(epoch) for epoch in epochs} == {frozenset(epochs[0])}


def test_any_step_can_be_asked_first(dataset: Dataset) -> None:
    source = _source(dataset)
    forward = [source.global_batch(step) for step in range(5)]
    fresh = _source(dataset)
    assert [fresh.global_batch(step) for step in reversed(range(5))] == forward[::-1]


def test_a_batch_larger_than_an_epoch_is_full(dataset: Dataset) -> None:
    packs = _source(dataset).plan.num_packs
    size = 2 * packs + 3
    source = _source(dataset, global_size=size)
    assert set(_samples(source.global_batch(0)).values()) == {2, 3}
    assert len(source.global_batch(1).sequences) == size
    assert source.global_batch(1).epoch == 2


def test_balance_gives_equal_counts_and_even_costs() -> None:
    generator = np.random.default_rng(0)
    costs = np.stack([generator.integers(3000, 4096, 64), generator.poisson(12, 64)], axis=1)
    members = balance(costs.astype(float), bins=8)
    assert sorted(item for member in members for item in member) == list(range(64))
    assert {len(member) for member in members} == {8}
    loads = np.array([costs[member].sum(axis=0) for member in members])
    naive = costs.reshape(8, 8, 2).sum(axis=1)
    assert (loads.max(axis=0) / loads.mean(axis=0)).max() <= 1.05
    assert (naive.max(axis=0) / naive.mean(axis=0)).max() > 1.05


def test_wrong_sizes_are_all_reported(dataset: Dataset) -> None:
    with pytest.raises(ConfigError) as caught:
        _source(dataset, global_size=8, micro_size=3)
    assert len(caught.value.problems) == 2
    assert "batch.global_size=8" in caught.value.problems[0]
    assert "data.packing=true" in caught.value.problems[1]
