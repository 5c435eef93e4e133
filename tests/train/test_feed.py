"""What a rank gets for a step: the same with and without workers, and only from sound pictures."""

import math
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data import images as images_module
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_pixels
from ghostvis_mega.data.pixels import ImageError
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.windows import PictureWindow, images_of, own_pictures
from ghostvis_mega.train.feed import Feed, augment_seed
from ghostvis_mega.utils.errors import DataError

STEPS = 5
RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, seq_length: 128}}
batch: {{global_size: 4}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: {steps}, seed: 7}}
log: {{output: {folder}/run}}
"""


def make_run(data: Path, folder: Path, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(RUN.format(data=data, folder=folder, steps=STEPS))
    return load_run_config(path, overrides)


def places(data: int = 1, *, rank: int = 0) -> Any:
    """The part of `Groups` that a feed reads, for a rank among data-parallel ones."""
    everyone = tuple(Place(data=number, pipeline=0, tensor=0) for number in range(data))
    return SimpleNamespace(
        degrees=SimpleNamespace(data=data, context=1),
        rank=rank,
        place=everyone[rank],
        places=everyone,
    )


def read_all(run: RunConfig, data: Path, groups: Any, *, first: int = 0) -> list[StepInput]:
    """Inputs of the steps from `first` on."""
    feed = Feed(run, groups, Dataset.open(data / "train.gvd"))
    try:
        return [feed.get(step)[1] for step in range(first, STEPS)]
    finally:
        feed.close()


def same(mine: Any, other: Any) -> bool:
    """Whether two inputs are equal to the last bit."""
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, other)
    if hasattr(mine, "tokens_BS") or isinstance(mine, StepInput | PictureWindow):
        return all(same(getattr(mine, f.name), getattr(other, f.name)) for f in fields(mine))
    if isinstance(mine, list | tuple):
        return len(mine) == len(other) and all(map(same, mine, other))
    return mine == other


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_change_nothing(easy_vqa: Path, tmp_path: Path, rank: int) -> None:
    groups = places(2, rank=rank)
    run = make_run(easy_vqa, tmp_path, "data.augment=true")
    ahead = make_run(easy_vqa, tmp_path, "data.augment=true", "data.num_workers=2")
    alone = read_all(run, easy_vqa, groups)
    assert same(alone, read_all(ahead, easy_vqa, groups))
    # A resumed run begins in the middle.
    assert same(alone[3:], read_all(ahead, easy_vqa, groups, first=3))
    assert not any(same(alone[0], other) for other in alone[1:])


def test_ranks_share_the_pictures_of_a_batch(easy_vqa: Path, tmp_path: Path) -> None:
    run = make_run(easy_vqa, tmp_path)
    ranks = [read_all(run, easy_vqa, places(2, rank=rank)) for rank in range(2)]
    dataset = Dataset.open(easy_vqa / "train.gvd")
    for first, second in zip(*ranks, strict=True):
        (own,), (other,) = first.windows, second.windows
        assert own.dispatch == other.dispatch
        assert first.trained_tokens == second.trained_tokens
        weights = [float(m.weights_BS.sum()) for r in (first, second) for m in r.micro_batches]
        assert sum(weights) == first.trained_tokens
        for rank, mine in enumerate((first, second)):
            (window,) = mine.windows
            expected = load_pixels(dataset, window.dispatch.encode[rank], size=64, seeds=None)
            assert torch.equal(window.pixels_N3hw, expected)
            shown = {slot.image_id for micro in mine.micro_batches for slot in micro.images}
            assert tuple(sorted(shown)) == window.dispatch.wanted[rank]


@pytest.mark.parametrize("window", [0, 1])
def test_the_most_pictures_are_known_before_any_is_read(
    easy_vqa: Path, tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(easy_vqa, tmp_path, f"tower.window={window}")
    groups = places(2)
    encoded = [
        len(pictures)
        for batch in read_all(run, easy_vqa, groups)
        for part in batch.windows
        for pictures in part.dispatch.encode
    ]
    assert min(encoded) < max(encoded), "or any step would do"
    monkeypatch.setattr("ghostvis_mega.train.feed.load_pixels", None)
    feed = Feed(run, groups, Dataset.open(easy_vqa / "train.gvd"))
    assert feed.most_pictures() == math.ceil(1.1 * max(encoded))


def test_windows_cut_a_step_and_nothing_else(easy_vqa: Path, tmp_path: Path) -> None:
    sizes = ["batch.global_size=6", "data.augment=true"]
    groups = places(2, rank=1)
    whole = read_all(make_run(easy_vqa, tmp_path, *sizes), easy_vqa, groups)
    cut = read_all(make_run(easy_vqa, tmp_path, *sizes, "tower.window=2"), easy_vqa, groups)
    for one, several in zip(whole, cut, strict=True):
        assert same(one.micro_batches, several.micro_batches)
        assert [window.num_micro_batches for window in several.windows] == [2, 1]
        at, seen = 0, {}
        for window in several.windows:
            micro_batches = several.micro_batches[at : at + window.num_micro_batches]
            at += len(micro_batches)
            shown = {slot.image_id for micro in micro_batches for slot in micro.images}
            assert window.dispatch.wanted[1] == tuple(sorted(shown))
            assert max(window.dispatch.loads) - min(window.dispatch.loads) <= 1
            seen |= dict(zip(window.dispatch.encode[1], window.pixels_N3hw, strict=True))
        # Who encodes a picture differs, how it is augmented does not.
        there = own_pictures(one.windows, 1)
        assert seen and all(torch.equal(there[i], seen[i]) for i in there.keys() & seen.keys())
        assert images_of(one.windows, 0) | images_of(one.windows, 1) == images_of(
            several.windows, 0
        ) | images_of(several.windows, 1)


def test_only_the_owner_decodes_a_picture(
    easy_vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(easy_vqa, tmp_path, "batch.global_size=6")
    load_image, decoded = images_module.load_image, []

    def count(data: bytes, **options: Any) -> torch.Tensor:
        decoded.append(data)
        return load_image(data, **options)

    monkeypatch.setattr(images_module, "load_image", count)
    dataset, shares = Dataset.open(easy_vqa / "train.gvd"), []
    for rank in range(3):
        decoded.clear()
        feed = Feed(run, places(3, rank=rank), dataset)
        (window,) = feed.get(0)[1].windows
        dispatch = window.dispatch
        expected = [dataset.image_bytes(image) for image in dispatch.encode[rank]]
        assert sorted(decoded) == sorted(expected)
        shares.append(len(decoded))
    assert sum(shares) == dispatch.num_images > max(shares) > 0


def test_augmentation_is_a_function_of_seed_epoch_and_picture(
    easy_vqa: Path, tmp_path: Path
) -> None:
    first = augment_seed(7, epoch=2, image=5)
    assert first == augment_seed(7, epoch=2, image=5)
    others = {augment_seed(8, epoch=2, image=5), augment_seed(7, epoch=3, image=5)}
    others |= {augment_seed(7, epoch=2, image=6), augment_seed(72, epoch=0, image=5)}
    assert len(others) == 4 and first not in others
    # All samples in each step: an epoch a step.
    sizes = ["data.packing=false", "batch.global_size=24"]
    run = make_run(easy_vqa, tmp_path, "data.augment=true", *sizes)
    plain = read_all(make_run(easy_vqa, tmp_path, *sizes), easy_vqa, places())
    dataset = Dataset.open(easy_vqa / "train.gvd")
    for epoch, work in enumerate(read_all(run, easy_vqa, places())):
        (window,) = work.windows
        images = window.dispatch.encode[0]
        seeds = [augment_seed(7, epoch=epoch, image=image) for image in images]
        expected = load_pixels(dataset, images, size=64, seeds=seeds)
        assert torch.equal(window.pixels_N3hw, expected)
        (unchanged,) = plain[epoch].windows
        assert not torch.equal(window.pixels_N3hw, unchanged.pixels_N3hw)
        assert torch.equal(unchanged.pixels_N3hw, plain[0].windows[0].pixels_N3hw)


def test_no_pictures_is_an_empty_batch(easy_vqa: Path) -> None:
    pixels = load_pixels(Dataset.open(easy_vqa / "train.gvd"), [], size=64, seeds=None)
    assert pixels.shape == (0, 3, 64, 64) and pixels.dtype == torch.uint8


def test_a_picture_that_cannot_be_decoded_is_named(
    easy_vqa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(easy_vqa / "train.gvd")
    load_image = images_module.load_image
    damaged = dataset.image_bytes(3)

    def refuse(data: bytes, **options: Any) -> torch.Tensor:
        return load_image(data[:40] if data == damaged else data, **options)

    monkeypatch.setattr(images_module, "load_image", refuse)
    assert load_pixels(dataset, [2, 4], size=64, seeds=None).shape == (2, 3, 64, 64)
    with pytest.raises(DataError, match=rf"image 3 of {dataset.path} cannot be used: ") as error:
        load_pixels(dataset, [2, 3], size=64, seeds=None)
    assert isinstance(error.value.__cause__, ImageError)


def test_a_damaged_shard_is_named(easy_vqa: Path, tmp_path: Path) -> None:
    copy = tmp_path / "train.gvd"
    shutil.copytree(easy_vqa / "train.gvd", copy)
    dataset = Dataset.open(copy)
    shard = copy / "media" / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[int(dataset.image_index[3]["offset"]) + 30] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"image 3 in {shard} does not match its crc"):
        load_pixels(dataset, [2, 3], size=64, seeds=None)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_at_the_step_that_needs_the_data(
    easy_vqa: Path, tmp_path: Path, workers: int
) -> None:
    run = make_run(easy_vqa, tmp_path, f"data.num_workers={workers}")
    feed = Feed(run, places(), Dataset.open(easy_vqa / "train.gvd"))
    global_batch = feed.source.global_batch

    def refuse(step: int) -> Any:
        if step == 2:
            raise DataError("step 2 cannot be read")
        return global_batch(step)

    feed.source.global_batch = refuse
    assert [feed.get(step)[0].step for step in range(2)] == [0, 1]
    with pytest.raises(DataError, match="step 2 cannot be read"):
        feed.get(2)
    feed.close()
