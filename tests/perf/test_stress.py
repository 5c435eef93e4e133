"""Hard batches in all layouts: no hang, equal calls; and what is broken on purpose is named."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghostvis_mega.cli.stress import _rows_of_a_failure
from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.parallel.trace_compare import head_line
from ghostvis_mega.perf.stress import spoiling_ranks
from ghostvis_mega.perf.stress_data import CROWD, KINDS, SEQ_LENGTH, write_datasets
from ghostvis_mega.perf.stress_layouts import (
    LAYOUTS,
    StressJob,
    StressLayout,
    choose_layouts,
    settings_of,
    split_steps,
    write_deepspeed_files,
)
from ghostvis_mega.utils.launch import RankError, RankHang
from tests.launch import ROOT

pytestmark = pytest.mark.world_size(4)


def run_command(*options: str, timeout_s: float) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows and standard error of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "ghostvis_mega", "stress", "--json", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return done.returncode, json.loads(done.stdout or "[]"), done.stderr


def endings(rows: list[dict[str, Any]]) -> list[int]:
    """Hangs, other failures and differences, which good and bad ends tell in the same rows."""
    found = {row["name"]: row for row in rows}
    named = [
        found[name]
        for name in ("hangs", "other failures of ranks", "differences between ranks' calls")
    ]
    assert all(row["ok"] == (row["value"] == 0) for row in named)
    return [row["value"] for row in named]


@pytest.mark.timeout(420)
def test_five_hundred_hard_steps() -> None:
    code, rows, errors = run_command("--steps", "500", timeout_s=400)
    values = {row["name"]: row["value"] for row in rows}
    assert code == 0, f"{rows}\n{errors[-3000:]}"
    assert values["steps"] == 500
    assert values["comparisons"] >= 50
    assert endings(rows) == [0, 0, 0]
    timed = {name.removesuffix(": time") for name in values if name.endswith(": time")}
    assert timed == {layout.name for layout in LAYOUTS}


def test_a_rank_with_other_buckets_is_named() -> None:
    """The run aborts inside gloo; what the ranks left behind says why."""
    code, rows, _ = run_command(
        "--steps", "8", "--layouts", "zero1", "--fault", "bucket", timeout_s=200
    )
    assert code == 1
    assert re.search(
        r"Group data \[0, 1, 2, 3\], call \d+: ranks 0, 2, 3 made reduce_scatter_tensor of \d+ "
        r"float32 .*; rank 1 made all_reduce of 256 float32",
        rows[-1]["name"],
    )
    assert endings(rows) == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("skip", r"ranks 0, 2, 3 made all_reduce of 3 float32 .*; rank 1 made only \d+ calls, and"),
        ("stall", r"ranks 0, 2, 3 made all_reduce of 3 float32 .*; rank 1 made only \d+ calls"),
    ],
)
def test_a_rank_that_leaves_the_others_waiting_is_named(fault: str, told: str) -> None:
    options = ["--steps", "8", "--layouts", "zero2", "--fault", fault, "--step-timeout-s", "15"]
    code, rows, errors = run_command(*options, timeout_s=200)
    assert code == 1
    assert re.search(told, rows[-1]["name"]), rows
    assert "hangs in step 4" in errors
    assert endings(rows) == [1, 0, 1]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (RankHang("time is up"), [1, 0, 0]),
        (RankError("watchdog", code=1, hung=True), [1, 0, 0]),
        (RankError("killed", code=1), [0, 1, 0]),
    ],
)
def test_a_rank_that_was_killed_before_its_first_line_left_nothing(
    failure: RankError | RankHang,
    expected: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "trace0.jsonl").write_text(head_line(3))
    (tmp_path / "trace1.jsonl").write_text("")
    (tmp_path / "trace2.jsonl").write_text(head_line(3)[:7])
    rows = _rows_of_a_failure(SimpleNamespace(folder=tmp_path), processes=4, failure=failure)
    assert endings(rows) == expected
    told = capsys.readouterr().err
    assert [rank for rank in range(4) if f"rank {rank} left no calls" in told] == [1, 2, 3]


def test_wrong_layouts_are_refused_at_once() -> None:
    code, _, errors = run_command("--layouts", "pp2,zero9", timeout_s=60)
    assert code == 2
    assert "zero9" in errors


def test_layouts_that_fit() -> None:
    assert [layout.name for layout in choose_layouts("pp2, zero3", processes=4)] == ["pp2", "zero3"]
    assert {layout.ranks for layout in choose_layouts("", processes=1)} == {1}
    assert "tp2-pp2" not in {layout.name for layout in choose_layouts("", processes=2)}
    with pytest.raises(ValueError, match="tp2-pp2: with 2 processes there are zero1"):
        choose_layouts("tp2-pp2", processes=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_break_no_rule(layout: StressLayout, device: Any, tmp_path: Path) -> None:
    job = StressJob(folder=tmp_path, layouts=LAYOUTS, steps=100, seed=0, step_timeout_s=60)
    write_deepspeed_files(job)
    run = settings_of(layout, job, steps=100, cuda=device == "cuda")
    assert rules.find_problems(run, world_size=4, device=device) == []
    assert deepspeed.find_problems(run, world_size=4) == []
    assert run.data.packing
    assert run.train.precision == ("bf16" if device == "cuda" else "fp32")


def test_only_losses_that_matter_are_spoiled() -> None:
    """Where nothing is trained, the second tensor rank's loss reaches neither sum nor gradient."""
    places = [SimpleNamespace(pipeline=p, tensor=t) for p in (0, 1) for t in (0, 1)]
    groups = SimpleNamespace(degrees=SimpleNamespace(pipeline=2), places=places)
    assert spoiling_ranks("mixed", groups) == [2, 3]
    assert spoiling_ranks("nothing", groups) == [2]


def test_steps_are_shared_out() -> None:
    assert split_steps(20, 7) == [3, 3, 3, 3, 3, 3, 2]


def test_the_data_is_as_hard_as_it_says(tmp_path: Path) -> None:
    write_datasets(tmp_path / "data")
    data = {kind: Dataset.open(tmp_path / "data" / f"{kind}.gvd") for kind in KINDS}
    pictures = {kind: dataset.sample_index["n_images"] for kind, dataset in data.items()}
    assert pictures["crowd"].max() == CROWD
    assert data["crowd"].lengths(tokens_per_image=1).max() <= SEQ_LENGTH
    assert pictures["text"].sum() == 0
    assert pictures["one picture"].sum() == 1
    lengths = data["lengths"].lengths(tokens_per_image=1)
    assert {SEQ_LENGTH - 1, SEQ_LENGTH, SEQ_LENGTH + 1} <= set(lengths.tolist())
    damaged = {
        kind: [i for i in range(dataset.num_samples) if dataset.crc_problem(i)]
        for kind, dataset in data.items()
    }
    assert damaged.pop("damage") == [3]
    assert damaged.pop("nothing") == [0, 1, 2, 3]
    assert not any(damaged.values())
