"""Damage that shows while training: the batch keeps its shape, the rest is untouched, the run stops
when it is too much."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ghostvis_mega.data.bad_samples import BadSamples
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.utils.errors import DataError

pytestmark = pytest.mark.durability

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("bad_feeds", HERE / "feeds.py")
assert _spec is not None and _spec.loader is not None
feeds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(feeds)

ALONE = ("data.blend=[]", "data.blend_changes=[]", "data.augment=false")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    feeds.write_blend(tmp_path)
    return tmp_path


def _flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0xFF
    file.write_bytes(data)


def _damage_samples(folder: Path, samples: list[int]) -> None:
    records = Dataset.open(folder / "a.gvd").sample_index
    for sample in samples:
        last = int(records["tok_off"][sample]) + int(records["tok_len"][sample]) - 1
        _flip(folder / "a.gvd" / "samples/tokens.bin", 2 * last)


def _ledger(folder: Path) -> list[dict]:
    file = folder / "run" / "rejected_at_run_time.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _step_of(feed, sample: int) -> int:  # noqa: ANN001
    return next(k for k in range(100) if sample in _samples(feed.source.global_batch(k)))


def _samples(batch) -> set[int]:  # noqa: ANN001
    return {index for row in batch.sequences for index in row.sample_ids}


def test_a_damaged_sample_keeps_its_shape_and_trains_nothing(folder: Path) -> None:
    good = feeds.open_feed(folder, *ALONE)
    with_image = int(good.corpus.datasets[0].sample_index["n_images"].argmax())
    step = _step_of(good, with_image)
    _, before = good.get(step)
    _damage_samples(folder, [with_image])
    feed = feeds.open_feed(folder, *ALONE)
    batch, after = feed.get(step)
    assert batch == good.source.global_batch(step)
    assert after.windows[0].dispatch == before.windows[0].dispatch
    touched = 0
    for old, new in zip(before.micro_batches, after.micro_batches, strict=True):
        assert torch.equal(old.cu_seqlens, new.cu_seqlens)
        assert torch.equal(old.positions_BS, new.positions_BS)
        assert [slot.image_id for slot in old.images] == [slot.image_id for slot in new.images]
        for place, sample in enumerate(old.sample_ids):
            part = slice(int(old.cu_seqlens[place]), int(old.cu_seqlens[place + 1]))
            if sample != with_image:
                for name in ("tokens_BS", "labels_BS", "weights_BS"):
                    assert torch.equal(getattr(old, name)[:, part], getattr(new, name)[:, part])
                continue
            touched += 1
            assert old.weights_BS[:, part].sum() > 0
            assert new.weights_BS[:, part].sum() == 0
            assert new.labels_BS[:, part].sum() == 0
            slots = [slot for slot in new.images if part.start <= slot.start < part.stop]
            image = new.tokens_BS[0, slots[0].start]
            width = good.run.model.tokens_per_image
            assert (new.tokens_BS[0, slots[0].start : slots[0].start + width] == image).all()
    assert touched == 1
    assert feed.bad_samples.count == 1
    (line,) = _ledger(folder)
    assert (line["kind"], line["sample"], line["rank"]) == ("sample", with_image, 0)
    assert "does not match its crc" in line["why"]
    feed.get(step)  # read again, as after a resume: it is known and not counted twice
    assert feed.bad_samples.count == len(_ledger(folder)) == 1


def test_a_damaged_picture_is_black_and_the_others_are_not(folder: Path) -> None:
    good = feeds.open_feed(folder, *ALONE)
    batch, before = good.get(0)
    image = batch.image_ids[2]
    record = good.corpus.datasets[0].image_index[image]
    _flip(folder / "a.gvd" / "media/00000.tar", int(record["offset"]) + int(record["size"]) // 2)
    feed = feeds.open_feed(folder, *ALONE)
    _, after = feed.get(0)
    old, new = (work.windows[0].pixels_N3hw for work in (before, after))
    same = (old == new).flatten(1).all(dim=1)
    assert same.tolist() == [index != 2 for index in range(len(batch.image_ids))]
    assert new[2].sum() == 0 < old[2].sum()
    (line,) = _ledger(folder)
    assert (line["kind"], line["image"]) == ("image", image)


def test_more_damage_than_the_budget_stops_the_run_with_the_list(folder: Path) -> None:
    bad = list(range(0, 120, 10))  # 12 of 400; 10 are always allowed
    _damage_samples(folder, bad)
    allowed = feeds.open_feed(folder, *ALONE, "data.bad_sample_budget=0.03")
    assert allowed.bad_samples.limit == 12
    for step in range(20):
        allowed.get(step)
    assert allowed.bad_samples.count == 12
    feed = feeds.open_feed(folder, *ALONE, f"log.output={folder}/second", workers=2)
    assert feed.bad_samples.limit == 10
    with pytest.raises(DataError, match="1[12] damaged samples or images, more than") as caught:
        for step in range(20):
            feed.get(step)
    feed.close()
    listed = [sample for sample in bad if f"sample {sample}" in str(caught.value)]
    assert len(listed) >= 11
    assert "rejected_at_run_time.jsonl" in str(caught.value)


def _read(feed, first: int, last: int) -> None:  # noqa: ANN001
    for step in range(first, last):
        feed.get(step)


def test_the_budget_is_one_for_a_run_that_was_resumed(folder: Path) -> None:
    bad = list(range(0, 120, 10))
    _damage_samples(folder, bad)
    options = (*ALONE, "data.bad_sample_budget=0.0275")  # 11 of 400
    first = feeds.open_feed(folder, *options)
    steps = [_step_of(first, sample) for sample in bad]
    half, end = sorted(steps)[6], max(steps) + 1
    _read(first, 0, half)
    before, state = first.bad_samples.count, first.state()
    assert 0 < before == state["bad_samples"] < 12
    assert len(json.dumps(state)) <= 1024
    # What is left in this process alone would pass.
    resumed = feeds.open_feed(folder, *options)
    resumed.check_state(state, step=half)
    assert resumed.bad_samples.count == before
    with pytest.raises(DataError, match="12 damaged samples or images") as caught:
        _read(resumed, half, end)
    assert all(f"sample {sample}" in str(caught.value) for sample in bad)
    # Resumed again, it stops at once; with a larger budget it goes on, and finds nothing new.
    with pytest.raises(DataError, match="12 damaged samples or images"):
        feeds.open_feed(folder, *options).check_state(state, step=half)
    allowed = feeds.open_feed(folder, *ALONE, "data.bad_sample_budget=0.03")
    allowed.check_state(state, step=half)
    _read(allowed, 0, end)
    assert allowed.bad_samples.count == len(_ledger(folder)) == 12
    # Without its list, a run still has the number from its checkpoint.
    (folder / "run" / "rejected_at_run_time.jsonl").unlink()
    unlisted = feeds.open_feed(folder, *options)
    assert unlisted.bad_samples.count == 0
    unlisted.check_state(state, step=half)
    assert unlisted.bad_samples.count == before
    with pytest.raises(DataError, match="12 damaged samples or images"):
        _read(unlisted, half, end)


def test_ranks_count_together_and_only_their_own_data(tmp_path: Path) -> None:
    def open_one(rank: int, data: str = "one") -> BadSamples:
        return BadSamples(tmp_path / "x.jsonl", budget=0, num_samples=9, rank=rank, data=data)

    ranks = [open_one(rank) for rank in range(3)]
    for number in range(10):
        ranks[number % 3].note("sample", number, key=f"k{number}", problem="crc")
        ranks[(number + 1) % 3].note("sample", number, key=f"k{number}", problem="crc")
    assert [rank.count for rank in ranks] == [10, 10, 10]
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 10
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write("not a line of ours\n[1]\n")
    other = open_one(0, data="another")
    other.note("sample", 3, key="", problem="crc")
    assert other.count == 1
    with pytest.raises(DataError, match="11 damaged .*image 4"):
        ranks[0].note("image", 4, key="", problem="crc")
    assert ranks[1].count == 11


def test_without_a_ledger_damage_is_an_error(folder: Path) -> None:
    _damage_samples(folder, [0])
    source = BatchSource(
        Dataset.open(folder / "a.gvd"),
        seq_length=256, global_size=400, micro_size=1, data_parallel=1, packing=False,
        tokens_per_image=16, seed=0,
    )  # fmt: skip
    with pytest.raises(DataError, match="sample 0 .* does not match its crc"):
        for row in source.global_batch(0).sequences:
            source.micro_batch((row,))
