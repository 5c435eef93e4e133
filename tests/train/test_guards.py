"""Bad steps are left out on all ranks, written down, and nothing else changes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.launch import launch

pytestmark = [pytest.mark.world_size(2), pytest.mark.durability]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guards")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    worker = Path(__file__).with_name("guard_worker.py")
    return launch(worker, ranks=2, timeout_s=250, folder=folder)


def left_out(folder: Path, run: str) -> list[dict[str, Any]]:
    lines = (folder / "job" / run / "skipped_steps.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def skipped(result: dict[str, Any]) -> list[int]:
    """The same on both ranks, and no bit of weights, masters or moments changed."""
    one, other = result["ranks"]
    assert one["skipped"] == other["skipped"]
    assert one["changed"] == other["changed"] == []
    return one["skipped"]


def test_a_clean_run_leaves_nothing_out(results: dict[str, Any], folder: Path) -> None:
    assert skipped(results["clean"]) == []
    assert all(map(math.isfinite, results["clean"]["ranks"][0]["losses"]))
    assert not (folder / "job" / "clean" / "skipped_steps.jsonl").exists()


def test_a_nan_on_one_rank_costs_one_step_and_names_its_samples(
    results: dict[str, Any], folder: Path
) -> None:
    result = results["nan"]
    assert skipped(result) == [5, 11]
    first, second = left_out(folder, "nan")
    assert (first["step"], first["ranks"]) == (6, [1])
    assert first["cause"] == "a loss that is not finite" and first["loss"] is None
    assert (second["step"], second["ranks"]) == (12, [0])
    assert second["cause"] == "LLM gradients that are not finite"
    assert math.isfinite(second["loss"]) and second["grad_norm"] is None
    for row, step, rank in ((first, "5", 1), (second, "11", 0)):
        assert row["samples"] == result["samples"][step][rank] != []
    # The statistics that judge later losses took no NaN: nothing else was left out.
    assert len(result["ranks"][0]["losses"]) == 30


def test_three_in_a_row_stop_with_all_that_explains_it(
    results: dict[str, Any], folder: Path
) -> None:
    result = results["stop"]
    assert skipped(result) == [4, 6, 7, 8]  # the first is alone
    assert "steps 7 to 9 were left out, the last for a loss that is not finite" in result["error"]
    bundle = folder / "job" / "stop" / "stopped-after-step-00000009"
    assert str(bundle) in result["error"]
    document = json.loads((bundle / "bundle.json").read_text())
    assert document["settings"]["train"]["steps"] == 30
    assert document["versions"]["torch"]
    assert [row["step"] for row in document["left_out"]] == [5, 7, 8, 9]
    assert all(row["samples"] for row in document["left_out"])
    assert document["last_steps"][-1]["step"] == 9
    for rank in range(2):
        assert load_file(bundle / f"random-{rank:05d}.safetensors")["torch/cpu"].numel() > 0


def test_a_spike_is_left_out_or_taken(results: dict[str, Any], folder: Path) -> None:
    assert skipped(results["skip"]) == [24]
    assert skipped(results["taken"]) == []
    (row,) = left_out(folder, "skip")
    assert row["sigma"] > 10 and row["cause"] == "a loss that was refused" and row["ranks"] == []
    assert row["samples"] == sorted({s for rank in results["skip"]["samples"]["24"] for s in rank})


def test_a_rollback_goes_on_behind_the_spike_with_the_last_checkpoint(
    results: dict[str, Any],
) -> None:
    back = results["back"]
    assert skipped(back) == [24]
    assert back["after_rollback"] == [[], []]
    assert all(back["undone"]), "steps 21 to 24 must have changed what was then undone"
    # No step comes twice, and none is left out but the spike.
    assert sorted(map(int, back["samples"])) == list(range(30))
    assert len(back["ranks"][0]["losses"]) == 30


def test_the_losses_that_judge_survive_a_resume(results: dict[str, Any]) -> None:
    assert skipped(results["resumed"]) == [21]
    assert len(results["resumed"]["ranks"][0]["losses"]) == 10
    assert skipped(results["forgetful"]) == []
