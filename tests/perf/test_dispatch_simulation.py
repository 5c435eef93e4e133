"""The simulated dispatch: packs as the planner makes them, batches as training deals them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.looks.mix import picture_sizes
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.perf import dispatch_simulation as simulation
from ghostvis_mega.perf.synthetic_data import write_synthetic

SIZES: dict[str, Any] = {
    "seq_length": 192,
    "tokens_per_image": 16,
    "segment_align": 4,
    "seed": 7,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """600 samples, two thirds with one of 90 pictures of different sizes."""
    numbers = np.arange(600)
    path = tmp_path_factory.mktemp("simulated") / "some.gvd"
    write_synthetic(
        path,
        text_lengths=8 + numbers * 37 % 61,
        image_of=np.where(numbers % 3 == 0, -1, numbers * 7 % 90),
        pictures=[(b"%d" % number, 14 + 28 * (number % 5), 28) for number in range(90)],
    )
    return Dataset.open(path)


def test_batches_and_owners_are_those_of_training(dataset: Dataset) -> None:
    packs = simulation.dataset_packs(dataset, **SIZES, native=False)
    shape = simulation.Shape(tensor=2, pipeline=2, packs_per_replica=3)
    source = BatchSource(
        dataset, **SIZES, global_size=12, micro_size=1, data_parallel=4, packing=True
    )
    places = shape.places(16)
    assert [place.data for place in places[:8]] == [0, 0, 1, 1, 2, 2, 3, 3]
    for step in range(8):
        figures = simulation.simulate_step(
            packs, shape, ranks=16, step=step, bytes_per_image=10, seed=7
        )
        wanted = [
            [image for micro in replica for row in micro for image in row.image_ids]
            for replica in source.global_batch(step).replicas
        ]
        dispatch = dispatch_images(wanted, places)
        assert figures.images == dispatch.num_images > 0
        assert figures.patches == pytest.approx(dispatch.imbalance())
        assert figures.least <= figures.patches
        volume = simulation.exchange_volume(dispatch, places, bytes_per_image=10)
        assert figures.sent.tolist() == volume.sent.tolist()
    # Negative control: another seed is another order.
    other = simulation.simulate_step(packs, shape, ranks=16, step=0, bytes_per_image=10, seed=8)
    first = simulation.simulate_step(packs, shape, ranks=16, step=0, bytes_per_image=10, seed=7)
    assert other.sent.tolist() != first.sent.tolist()


def test_native_pictures_cost_their_own_patches(dataset: Dataset) -> None:
    packs = simulation.dataset_packs(dataset, **SIZES, native=True)
    assert packs.patches[:5].tolist() == [2, 6, 10, 14, 18]
    assert not packs.alike
    fixed = simulation.dataset_packs(dataset, **SIZES, native=False)
    assert fixed.alike and fixed.patches.tolist() == [576] * 90
    shape = simulation.Shape(packs_per_replica=4)
    figures = simulation.simulate_step(packs, shape, ranks=4, step=0, bytes_per_image=1, seed=7)
    assert 1.0 <= figures.least <= figures.patches < 1.1


def test_sizes_of_the_mix() -> None:
    sizes = picture_sizes(20_000, seed=3)
    assert sizes.tolist() == picture_sizes(20_000, seed=3).tolist()
    assert sizes.tolist() != picture_sizes(20_000, seed=4).tolist()
    large = (sizes.max(axis=1) == 1024).mean()
    assert 0.23 < large < 0.27


def run_command(*words: str) -> tuple[int, list[dict[str, Any]]]:
    done = CliRunner().invoke(app, ["simulate", "dispatch", "--json", *words])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("[") else []


@pytest.mark.parametrize("native", [[], ["--native"]])
def test_the_mix_is_even_at_64_and_512_ranks(native: list[str]) -> None:
    code, rows = run_command("--ranks", "64,512", "--steps", "3", *native)
    assert code == 0
    values = {row["name"]: row["value"] for row in rows}
    assert values["512 ranks: packs a step"] == 1024
    for ranks in (64, 512):
        assert values[f"{ranks} ranks: patches, busiest rank over mean"] <= 1.05
        assert values[f"{ranks} ranks: bytes sent, mean rank"] > 50
    assert sum(row["bar"] is not None for row in rows) == 6


def test_context_ranks_share_the_rows() -> None:
    words = ["--ranks", "64", "--steps", "2", "--tensor", "2", "--pipeline", "1"]
    rows = {context: run_command(*words, "--context", context)[1] for context in ("1", "4")}
    values = {
        context: {row["name"]: row["value"] for row in each} for context, each in rows.items()
    }
    assert [values[context]["64 ranks: replicas"] for context in ("1", "4")] == [32, 8]
    sent = [values[c]["64 ranks: bytes sent, mean rank"] for c in ("1", "4")]
    # A quarter of the replicas want a quarter of the pictures, each over four ranks in quarters.
    assert sent[1] < 0.5 * sent[0]


def test_few_pictures_a_rank_miss_the_bar() -> None:
    code, rows = run_command("--ranks", "512", "--steps", "2", "--global-size", "128")
    assert code == 1
    missed, worst = [row for row in rows if row["ok"] is False]
    assert missed["name"] == "512 ranks: patches, busiest rank over mean"
    assert worst["name"] == "512 ranks: same, worst step"
    (least,) = [row for row in rows if row["name"] == "512 ranks: same, least possible"]
    assert missed["value"] == least["value"] > 1.05


def test_a_dataset_is_simulated(dataset: Dataset) -> None:
    sizes = ["--seq-length", "192", "--tokens-per-image", "16", "--tensor", "1", "--pipeline", "1"]
    code, rows = run_command("--data", str(dataset.path), "--ranks", "2", "--steps", "2", *sizes)
    assert code in (0, 1) and rows[0] == {
        "name": "2 ranks: replicas", "value": 2, "unit": "", "bar": None, "ok": None
    }  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--ranks", "12"],
        ["--ranks", "8,x"],
        ["--ranks", "64", "--global-size", "12"],
        ["--data", "nowhere.gvd"],
        ["--mix", "other"],
    ],
)
def test_wrong_options_end_with_2(words: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["simulate", "dispatch", *words])
    assert done.exit_code == 2
