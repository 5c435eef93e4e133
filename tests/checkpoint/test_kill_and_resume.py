"""N steps, kill -9 of all ranks, N steps: the bits of a run that was never stopped.

Whole runs through the session: feed with and without workers, augmented pictures, the tower on all
ranks, the thread that writes, guards.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_drills import command, drill
from tests.launch import ROOT

pytestmark = [pytest.mark.world_size(2), pytest.mark.durability]

RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, seq_length: 128, augment: true, segment_align: 4}}
batch: {{global_size: 4}}
optim: {{schedule: cosine, warmup_steps: 1, lr: {{llm: 1.0e-3, vision: 1.0e-3, projector: 1.0e-3}}}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: 4, device: cpu, timeout_s: 120}}
log: {{output: {folder}/run}}
"""
CASES = {
    "dp2 zero2": "data.num_workers=2 deepspeed.llm=ds_configs/zero2.json",
    "tp2 zero1": "parallel.tensor=2 data.num_workers=0",
    "pp2 zero1": "parallel.pipeline=2 data.num_workers=2",
    "cp2 zero2": "parallel.context=2 data.num_workers=0 deepspeed.llm=ds_configs/zero2.json",
}


@pytest.fixture(scope="module")
def config(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    path = folder / "run.yaml"
    path.write_text(RUN.format(data=easy_vqa, folder=folder))
    return path


@pytest.fixture(scope="module")
def rows(config: Path) -> dict[str, dict[str, Any]]:
    os.chdir(ROOT)
    cases = [part for name, text in CASES.items() for part in ("--case", f"{name}: {text}")]
    code, rows, said = drill("resume", "--config", str(config), *cases)
    assert code == 0, said[-6000:]
    return rows


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(rows: dict[str, Any], case: str):
    assert rows[f"{case}: steps saved when it was killed"]["value"] == 2
    assert rows[f"{case}: files compared"]["value"] >= 4
    for name in (
        "files with other bits",
        "steps with another loss, norm or batch",
        "other counts, guards or data position",
    ):
        assert rows[f"{case}: {name}"]["value"] == 0


def test_the_size_of_a_checkpoint_is_known_before(config: Path):
    code, rows, said = command("bench", "checkpoint", str(config), "--saves", "1", "--steps", "2")
    assert code == 0, said[-3000:]
    assert rows["checkpoint"]["value"] > 0.005
    assert rows["size predicted at the save, error"]["value"] < 0.01
    assert rows["size predicted from the settings, error"]["value"] < 0.05
    assert rows["share of time, a save every 10 minutes"]["ok"]
    # A bench that is killed later has told them already.
    told = [json.loads(line) for line in re.findall(r"after save 1 of 1: (\{.*\})", said)]
    assert {row["name"]: row for row in told} == rows


def test_a_resume_that_forgets_one_moment_is_noticed(config: Path):
    code, rows, said = drill("resume", "--config", str(config), "--case", "dp:", "--fault")
    assert code == 1, said[-3000:]
    assert rows["dp: files with other bits"]["value"] > 0
