"""The blend example: inputs, four recipes, and training on three datasets at once, as documented.

A copy of the example's files in an empty folder, where its relative paths find everything.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.readers.easy_vqa import easy_vqa_rows
from ghostvis_mega.utils.errors import DataError
from tests.launch import ROOT
from tools.preprocess import demo_blend
from tools.preprocess.cli import main
from tools.preprocess.demo_blend import STAMPS, find_chats, write_captions, write_chats

RECIPES = ("blend_stamps", "blend_vqa", "blend_vqa_test", "blend_chat")
STEPS, ROWS = 3, 300
CONVERSATIONS = [
    ["What is this?", "A small set."],
    ["Are you there?", "Yes.", "Good.", "Thank you.", "Never answered."],
    ["Said alone."],
    [1, True],
]


def _preprocess(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


def _run_example(folder: Path, *, stamps: Path, chats: Path) -> list[dict]:
    """Prepare, build and train in `folder`; the lines of metrics.jsonl."""
    (folder / "examples/recipes").mkdir(parents=True)
    (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
    out = folder / "datasets/blend"
    _preprocess("demo-blend", "--out", out, "--stamps", stamps, "--chats", chats, "--vocab", "512")
    for name in RECIPES:
        recipe = yaml.safe_load((ROOT / f"examples/recipes/{name}.yaml").read_text())
        (source,) = recipe["sources"]
        source["limit"] = ROWS
        if "images" in source:
            assert source["images"] == str(STAMPS)
            source["images"] = str(stamps)
        path = folder / f"examples/recipes/{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        _preprocess("build", path)
    command = [sys.executable, str(ROOT / "examples/pretrain_vlm.py")]
    command += ["--config", str(ROOT / "examples/configs/vlm_tiny_blend.yaml")]
    command += [f"train.steps={STEPS}", "optim.warmup_steps=1", "log.preview_steps=[]"]
    command += ["log.every=1", "batch.global_size=4"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (folder / "runs/blend/report/index.html").stat().st_size > 10_000
    lines = (folder / "runs/blend/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def _counts(folder: Path, name: str) -> tuple[int, int]:
    with Dataset.open(folder / f"datasets/blend/{name}.gvd") as opened:
        return opened.num_samples, opened.num_images


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations in chatterbot's layout."""
    folder = tmp_path / "chats"
    folder.mkdir()
    document = {"categories": ["test"], "conversations": CONVERSATIONS}
    (folder / "few.yml").write_text(yaml.safe_dump(document))
    return folder


def test_example_with_pictures_of_easy_vqa(tmp_path: Path, chats: Path) -> None:
    stamps = tmp_path / "stamps" / "shapes"
    stamps.mkdir(parents=True)
    for number, row in zip(range(5), easy_vqa_rows("train", limit=100), strict=False):
        shutil.copy(row.images[0], stamps / f"{number}.png")
        (stamps / f"{number}.txt").write_text(f"A shape, number {number}.\nde.utf8=Eine Form.\n")
    folder = tmp_path / "example"
    metrics = _run_example(folder, stamps=stamps.parent, chats=chats)
    assert [_counts(folder, name)[0] for name in ("stamps", "vqa", "chat")] == [5, ROWS, 3]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.skipif(
    not STAMPS.is_dir(), reason=f"no {STAMPS}: apt-get install -y tuxpaint-stamps-default"
)
def test_example_with_the_stamps(tmp_path: Path, chats: Path) -> None:
    metrics = _run_example(tmp_path / "example", stamps=STAMPS, chats=chats)
    samples, images = _counts(tmp_path / "example", "stamps")
    assert samples == ROWS and images > 0.9 * ROWS
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_what_is_written(tmp_path: Path, chats: Path) -> None:
    for name in ("b.png", "a.png", "a.txt", "b.svg", "c.txt"):
        (tmp_path / name).write_text("One, two.\nde.utf8=Eins.\n")
    assert write_captions(tmp_path, tmp_path / "rows.csv") == 1
    assert (tmp_path / "rows.csv").read_text() == 'image,caption\na.png,"One, two."\n'
    assert write_chats(chats, tmp_path / "chat.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["few/0", "few/1", "few/3"]
    assert [message["content"] for message in rows[1]["messages"]] == CONVERSATIONS[1][:4]
    assert [message["content"] for message in rows[2]["messages"]] == ["1", "True"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="apt-get install -y tuxpaint-stamps-default"):
        write_captions(tmp_path / "none", tmp_path / "rows.csv")
    with pytest.raises(DataError, match="holds no conversations"):
        write_chats(tmp_path, tmp_path / "chat.jsonl")
    monkeypatch.setattr(demo_blend, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps chatterbot-corpus"):
        find_chats()
