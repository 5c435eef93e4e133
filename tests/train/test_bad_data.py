"""Broken pictures, a cut shard, a killed reader: the run ends, and only the damage is missing."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.layout import shard_name
from ghostvis_mega.perf.stress_layouts import LAYOUTS, StressJob, settings_of, write_deepspeed_files
from ghostvis_mega.perf.synthetic_data import write_synthetic
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import ConfigError
from tests.data.feeds import jpeg
from tests.launch import RankError, launch
from tests.train.bad_data_worker import trained_on
from tests.train.test_feed import places

STEPS, RESUMED_AT = 24, 10
COUNTS = {"a": 200, "b": 40}
"""Samples of the two datasets, each with a picture of its own."""
FLIPPED = (17, 130)
"""Pictures of `a` of which a byte is wrong: 1 %."""

pytestmark = [pytest.mark.world_size(2), pytest.mark.durability]


def write_run(folder: Path) -> Path:
    """Two datasets and the settings of a run on them."""
    for number, (name, count) in enumerate(COUNTS.items()):
        write_synthetic(
            folder / f"{name}.gvd",
            text_lengths=np.full(count, 24),
            image_of=np.arange(count),
            pictures=[(jpeg(1000 * number + k, width=16, height=16), 16, 16) for k in range(count)],
            vocab_size=300,
            seed=number,
        )
    job = StressJob(folder, LAYOUTS[:1], steps=STEPS, seed=3, step_timeout_s=240)
    write_deepspeed_files(job)
    run = settings_of(LAYOUTS[0], job, steps=STEPS, cuda=False).model_dump(mode="json")
    run["data"] |= {
        "train": str(folder / "a.gvd"),
        "heldout": None,
        "blend": [{"path": str(folder / f"{n}.gvd"), "weight": w} for n, w in (("a", 4), ("b", 1))],
        "bad_sample_budget": 0.2,
        "num_workers": 2,
    }
    run["batch"] |= {"global_size": 8}
    run["log"] |= {"preview_steps": [], "output": str(folder / "run")}
    run["checkpoint"] |= {"save_every": 5}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def damage(folder: Path) -> set[int]:
    """Break what `FLIPPED` says, and tell the worker where to cut the shard of `b`; the numbers of
    the pictures behind the cut."""
    records = Dataset.open(folder / "a.gvd").image_index
    shard = folder / "a.gvd" / shard_name(0)
    data = bytearray(shard.read_bytes())
    for image in FLIPPED:
        data[int(records[image]["offset"]) + int(records[image]["size"]) // 2] ^= 0xFF
    shard.write_bytes(data)
    records = Dataset.open(folder / "b.gvd").image_index
    ends = records["offset"].astype(np.int64) + records["size"]
    left = int(ends[len(ends) // 2])
    (folder / "cut.json").write_text(json.dumps([str(folder / "b.gvd" / shard_name(0)), left]))
    return {COUNTS["a"] + int(n) for n in np.flatnonzero(ends > left)}


def expected_steps(config: Path) -> tuple[dict[int, dict[int, Any]], dict[int, set[int]], Feed]:
    """Of sound data: by rank and step what is trained on; by step the pictures that are read."""
    run = load_run_config(config, ["data.num_workers=0"])
    feeds = [Feed(run, places(2, rank=rank), Dataset.open(run.data.train)) for rank in range(2)]
    trained: dict[int, dict[int, Any]] = {0: {}, 1: {}}
    images = {}
    for step in range(STEPS):
        for rank, feed in enumerate(feeds):
            batch, work = feed.get(step)
            trained[rank][step] = trained_on(work)
        images[step] = set(batch.image_ids)
    return trained, images, feeds[0]


def rows_of(folder: Path, which: str, rank: int) -> list[Any]:
    return [json.loads(t) for t in (folder / f"{which}{rank}.jsonl").read_text().splitlines()]


def test_the_run_ends_without_the_damage_and_with_all_else(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    trained, images, feed = expected_steps(config)
    cut = damage(tmp_path)
    worker = Path(__file__).with_name("bad_data_worker.py")
    options = {"ranks": 2, "timeout_s": 200}

    with pytest.raises(RankError) as caught:
        launch(worker, folder=tmp_path / "one", args=[str(tmp_path), "first"], **options)
    assert time.time() - float((tmp_path / "killed").read_text()) <= 30
    assert "rank 1 of 2 ended with -9" in str(caught.value)
    launch(worker, folder=tmp_path / "two", args=[str(tmp_path), "second"], **options)

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["goodput_seconds"]["restart"] > 0
    bad = {"first": set(FLIPPED), "second": {*FLIPPED, *cut}}
    late = {image for step in range(RESUMED_AT, STEPS) for image in images[step]}
    expected = (cut & late) | {i for i in FLIPPED if any(i in images[k] for k in range(STEPS))}
    lines = (tmp_path / "run" / "rejected_at_run_time.jsonl").read_text().splitlines()
    listed = [(row["kind"], row[row["kind"]]) for row in map(json.loads, lines)]
    assert sorted(listed) == sorted(("image", image) for image in expected)
    assert len(cut & late) >= 5 and expected & set(FLIPPED)

    for rank in range(2):
        lost = 0
        for which in bad:
            rows = rows_of(tmp_path, which, rank)
            first = 0 if which == "first" else RESUMED_AT
            assert [row[0] for row in rows] == list(range(first, first + len(rows)))
            for step, _, found in rows:
                good = trained[rank][step]
                assert found == [
                    [sample, 0.0 if bad[which] & set(feed.corpus.images_of(sample)) else weight]
                    for sample, weight in good
                ], f"{which} launch, step {step}, rank {rank}"
                lost += sum(now[1] != then[1] for now, then in zip(found, good, strict=True))
        assert rows[-1][0] == STEPS - 1
        assert lost > 0, "the damage must have cost something"


def test_a_shard_that_is_cut_before_the_start_is_refused_by_name(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    damage(tmp_path)
    shard, size = json.loads((tmp_path / "cut.json").read_text())
    os.truncate(shard, size)
    with pytest.raises(ConfigError, match=f"{shard} has {size} bytes, the manifest says .* copy"):
        load_checked(config, [], world_size=2)
