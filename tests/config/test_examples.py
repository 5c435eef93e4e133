"""The example files are right for the machines that their comments name."""

from pathlib import Path

import pytest

from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.sizes import parameter_counts

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "configs"

CASES = [
    ("vlm_tiny_easyvqa.yaml", [], 1, "cpu"),
    ("vlm_tiny_easyvqa.yaml", [], 2, "cpu"),
    ("vlm_tiny_easyvqa.yaml", ["parallel.tensor=2", "parallel.pipeline=2"], 4, "cpu"),
    ("vlm_tiny_blend.yaml", [], 1, "cpu"),
    ("vlm_smollm2_easyvqa.yaml", [], 1, "cpu"),
    ("vlm_1_5b_easyvqa.yaml", [], 1, "cuda"),
    ("vlm_1_5b_easyvqa.yaml", ["parallel.tensor=2"], 4, "cuda"),
    ("vlm_1_5b_easyvqa.yaml", ["parallel.pipeline=2"], 4, "cuda"),
    ("vlm_fp8_easyvqa.yaml", [], 1, "cuda"),
    ("vlm_fp8_easyvqa.yaml", ["train.fp8=delayed"], 1, "cuda"),
    ("vlm_fp8_easyvqa.yaml", ["train.fp8=tensorwise"], 1, "cuda"),
    ("vlm_fp8_easyvqa.yaml", ["train.fp8=blockwise"], 2, "cuda"),
    ("vlm_7b_sft.yaml", [], 8, "cuda"),
    ("vlm_7b_sft.yaml", ["train.freeze=[vision]"], 64, "cuda"),
]


@pytest.mark.parametrize(("name", "overrides", "world", "device"), CASES)
def test_example_obeys_the_rules(monkeypatch, name, overrides, world, device):
    monkeypatch.chdir(ROOT)
    run = load_run_config(FOLDER / name, overrides)
    assert rules.find_problems(run, world_size=world, device=device) == []
    assert deepspeed.find_problems(run, world_size=world) == []


def test_every_example_is_tested():
    assert {path.name for path in FOLDER.glob("*.yaml")} == {name for name, *_ in CASES}


def test_the_demo_is_small_enough_for_a_laptop():
    run = load_run_config(FOLDER / "vlm_tiny_easyvqa.yaml")
    assert sum(parameter_counts(run.model).values()) < 5e6
