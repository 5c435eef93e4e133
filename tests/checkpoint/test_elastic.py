"""A checkpoint of any layout resumes in any other: the same bits, then the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT

pytestmark = [pytest.mark.world_size(4), pytest.mark.durability]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elastic")
    worker = Path(__file__).with_name("elastic_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(folder)],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


def pairs(results: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{source} -> {name}": (results[name], pair)
        for name in results
        for source, pair in results[name]["pairs"].items()
    }


def test_at_least_twelve_pairs_of_one_two_and_four_ranks(results: dict[str, Any]):
    moved = [name.split(" -> ") for name in pairs(results)]
    assert len(moved) >= 12
    sizes = {(source.split()[0], target.split()[0]) for source, target in moved}
    assert sizes >= {
        ("one", "two"), ("one", "four"), ("two", "one"), ("two", "two"), ("two", "four"),
        ("four", "one"), ("four", "two"),
    }  # fmt: skip


def test_weights_masters_and_moments_are_the_same_bits(results: dict[str, Any]):
    for name, (_, pair) in pairs(results).items():
        assert (pair["step"], pair["sequences"]) == (2, 16), name
        assert pair["differing"] == [], name


def test_the_next_steps_have_the_losses_of_the_uninterrupted_run(results: dict[str, Any]):
    whole = {False: results["one zero0"]["losses"], True: results["two bf16 tp2sp zero2"]["losses"]}
    for name, (_, pair) in pairs(results).items():
        expected = whole["bf16" in name][2:]
        bar = 2e-3 if "bf16" in name else 1e-5
        assert pair["losses"] == pytest.approx(expected, rel=bar), name
    first, second = whole[False][2:]
    # The bar would notice a step that was not taken, or taken from other moments.
    assert first != pytest.approx(second, rel=1e-3)


def test_a_reader_that_mixes_up_rows_is_noticed(results: dict[str, Any]):
    control = results["two tp2sp zero1"]["pairs"]["one zero0"]["control"]
    stacked = {name for name in control if name.endswith("linear_fc1.weight")}
    assert stacked == set(control)
    assert {name.split("/")[0] for name in stacked} > {"exp_avg", "exp_avg_sq"}
