"""A gap of losses is seen, told from noise, and held against its bar."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.cli import bench_fp8 as command
from ghostvis_mega.perf import loss_gap_runs
from ghostvis_mega.perf.loss_gap import (
    Curve,
    compare_losses,
    finding,
    losses_table,
    read_curve,
    speed,
)
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.utils.errors import DataError
from tests.launch import ROOT

STEPS = 500
BAR = 0.3


def make_step(step: int, **changes: Any) -> StepMetrics:
    """A step whose batch is harder or easier than others, by far more than any gap."""
    draw = random.Random(step)
    values = {
        "step": step,
        "loss": 0.4 + 5 * math.exp(-step / 60) + 0.1 * draw.random(),
        "grad_norm": 1 + draw.random(),
        "skipped": False,
        "lr": {"llm": 1e-4},
        "tokens": 2000 + draw.randrange(48),
        "trained_tokens": 200,
        "images": 50,
        "samples": 100,
        "seconds": 0.1,
        "timing": {},
        "flops_llm": 1.0,
        "flops_vision": 1.0,
    }
    return StepMetrics(**(values | changes))


def write_metrics(path: Path, steps: Sequence[StepMetrics]) -> Path:
    path.write_text("".join(f"{step.to_json()}\n" for step in steps))
    return path


def make_curve(folder: Path, name: str, *, percent: float = 0.0, first: int = 1) -> Curve:
    """A run written and read, with losses that are off from step `first` on."""
    steps = [make_step(step) for step in range(1, STEPS + 1)]
    steps = [
        dataclasses.replace(s, loss=s.loss * (1 + percent / 100)) if s.step >= first else s
        for s in steps
    ]
    return read_curve(name, write_metrics(folder / f"{name}.jsonl", steps), steps=STEPS)


def rows_of(base: Curve, other: Curve, twins: Sequence[Curve] = ()) -> dict[str, dict[str, Any]]:
    """Rows by the part of the name that says what they are."""
    rows = compare_losses(base, twins, [other], bar_percent=BAR, alone=True)
    about = f"{other.name} against {base.name}: "
    return {row["name"].removeprefix(about): row for row in rows}


@pytest.mark.parametrize(("percent", "ok"), [(0.0, True), (0.29, True), (1.0, False), (-1, False)])
def test_a_gap_of_one_percent_is_seen(tmp_path: Path, percent: float, ok: bool) -> None:
    base, other = make_curve(tmp_path, "base"), make_curve(tmp_path, "other", percent=percent)
    rows = rows_of(base, other)
    row = rows["gap of the last 50 steps"]
    assert row["value"] == pytest.approx(percent, abs=1e-9)
    assert (row["bar"], row["ok"]) == (BAR, ok)
    assert rows["gap of all steps"]["value"] == pytest.approx(percent, abs=1e-9)
    assert rows["gap of the first step, equal weights"]["value"] == pytest.approx(percent, abs=1e-9)


def test_only_the_last_tenth_has_the_bar(tmp_path: Path) -> None:
    base = make_curve(tmp_path, "base")
    late = rows_of(base, make_curve(tmp_path, "late", percent=1, first=451))
    assert late["gap of the last 50 steps"]["ok"] is False
    assert late["gap of all steps"]["value"] < 0.1
    assert late["gap of the first step, equal weights"]["value"] == 0
    worst = late["largest gap of 50 steps' moving mean"]["value"]
    assert worst == pytest.approx(late["gap of the last 50 steps"]["value"]) == pytest.approx(1)
    assert late["the moving mean's largest gap is at step"]["value"] == STEPS


def test_a_loss_that_is_no_number_is_no_gap_of_none(tmp_path: Path) -> None:
    base, other = make_curve(tmp_path, "base"), make_curve(tmp_path, "other")
    other.losses[-3] = math.nan
    rows = rows_of(base, other)
    row = rows["gap of the last 50 steps"]
    assert (row["value"], row["ok"]) == (None, False)
    assert rows["largest gap of 50 steps' moving mean"]["value"] is None
    assert "no number" in rows["other: finding"]["value"]
    json.dumps(list(rows.values()), allow_nan=False)


def test_other_batches_and_steps_left_out_are_seen(tmp_path: Path) -> None:
    base, other = make_curve(tmp_path, "base"), make_curve(tmp_path, "other")
    assert rows_of(base, other)["steps with other data"]["ok"] is True
    other.data[7], other.data[9] = other.data[9], other.data[7]
    assert rows_of(base, other)["steps with other data"] == {
        **rows_of(base, other)["steps with other data"],
        "value": 2,
        "ok": False,
    }
    skipping = [make_step(s, skipped=s == 3) for s in range(1, STEPS + 1)]
    curve = read_curve("x", write_metrics(tmp_path / "x", skipping), steps=STEPS)
    assert rows_of(base, curve)["x: steps left out"]["ok"] is False


def test_gradient_norms_are_compared(tmp_path: Path) -> None:
    base, other = make_curve(tmp_path, "base"), make_curve(tmp_path, "other")
    other.norms[:] = [norm * 1.5 for norm in other.norms]
    rows = rows_of(base, other)
    for part in ("of the last 50 steps", "of all steps"):
        assert rows[f"gradient norm's gap {part}"]["value"] == pytest.approx(50)


def test_noise_is_the_largest_gap_of_the_twins(tmp_path: Path) -> None:
    base, other = make_curve(tmp_path, "base"), make_curve(tmp_path, "other", percent=0.2)
    twins = [make_curve(tmp_path, f"twin {p}", percent=p) for p in (0.1, -0.25)]
    rows = rows_of(base, other, twins)
    assert rows["noise: largest gap of base to itself"]["value"] == pytest.approx(0.25)
    assert "no finding" in rows["other: finding"]["value"]
    assert "above" in rows_of(base, other, twins[:1])["other: finding"]["value"]
    # A twin has no bar of its own.
    assert rows["twin -0.25 against base: gap of the last 50 steps"]["ok"] is None


def test_a_gap_within_the_noise_still_counts_against_the_bar(tmp_path: Path) -> None:
    base, other = make_curve(tmp_path, "base"), make_curve(tmp_path, "other", percent=0.5)
    rows = rows_of(base, other, [make_curve(tmp_path, "twin", percent=0.6)])
    assert rows["gap of the last 50 steps"]["ok"] is False
    assert "more than the bar" in rows["other: finding"]["value"]
    assert "no second run" in finding(0.1, math.nan, BAR)


@pytest.mark.parametrize(
    ("seconds", "word"), [(0.13, "SLOWER than base, 1.30"), (0.08, "faster"), (0.101, "as fast as")]
)
def test_what_is_slower_is_said(tmp_path: Path, seconds: float, word: str) -> None:
    base, other = make_curve(tmp_path, "base"), make_curve(tmp_path, "other")
    # The first tenth does not count: with it, the median would be among the slow ones at the end.
    other.seconds[:] = [60.0] * 50 + [seconds] * 226 + [30.0] * 224
    assert speed(base, other, alone=True).startswith(word)
    assert "side-by-side" in speed(base, other, alone=False)


def test_the_table_has_twenty_rows_that_cover_all_steps(tmp_path: Path) -> None:
    curves = [make_curve(tmp_path, "a"), make_curve(tmp_path, "b", percent=10)]
    lines = losses_table(curves).splitlines()
    assert len(lines) == 2 + 20
    assert lines[0] == "| steps | a | b |"
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [c[0] for c in (cells[0], cells[-1])] == ["1-25", "476-500"]
    for _, ours, theirs in cells:
        assert float(theirs) == pytest.approx(1.1 * float(ours), abs=2e-4)
    mean = sum(float(c[1]) for c in cells) / 20
    assert mean == pytest.approx(sum(curves[0].losses) / STEPS, abs=1e-4)


@pytest.mark.parametrize("steps", [range(1, STEPS), [*range(1, STEPS), STEPS - 1], range(2, 502)])
def test_a_file_without_all_steps_is_refused(tmp_path: Path, steps: Sequence[int]) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", [make_step(step) for step in steps])
    with pytest.raises(DataError, match=r"metrics\.jsonl holds .* for 500 steps"):
        read_curve("x", path, steps=STEPS)


def test_a_gpu_without_fp8_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    import typer

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "L40S")
    command._check_gpu([command.Recipe.delayed, command.Recipe.none])
    with pytest.raises(typer.Exit) as refused:
        command._check_gpu([command.Recipe.blockwise])
    assert refused.value.exit_code == 2
    assert (
        "blockwise needs CUDA compute capability 9.0, but L40S has 8.9" in capsys.readouterr().err
    )


SCRIPT = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[3])
(folder / "started").write_text(str(time.time()))
time.sleep(float(sys.argv[4]))
(folder / "ended").write_text(str(time.time()))
sys.exit(sys.argv[5] if len(sys.argv) > 5 else 0)
"""
"""Stands for a run: waits, and ends with 0 or with a message."""


def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *endings: list[str], **options: Any
) -> tuple[dict[str, str], list[float | None], list[float | None]]:
    """Launch one script for each of `endings`: failures, starts and ends."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(loss_gap_runs, "TRAIN_SCRIPT", script)
    variants = [
        loss_gap_runs.Variant(str(i), (str(tmp_path / str(i)), *ending), tmp_path / str(i))
        for i, ending in enumerate(endings)
    ]
    settings = {"processes": 1, "device": "cpu", "timeout_s": 60.0, "side_by_side": False}
    failures = loss_gap_runs.train_variants(Path("x.yaml"), variants, **(settings | options))
    times = [
        [float(path.read_text()) if path.exists() else None for path in paths]
        for paths in ([v.folder / name for v in variants] for name in ("started", "ended"))
    ]
    return failures, times[0], times[1]


def test_launches_are_one_after_the_other_and_one_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, starts, ends = train(tmp_path, monkeypatch, ["0"], ["0", "no luck"], ["0"])
    assert list(failures) == ["1"]
    assert "no luck" in failures["1"]
    assert ends[0] <= starts[1] and ends[1] <= starts[2]


def test_side_by_side_all_run_at_once_and_time_is_up_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, starts, ends = train(
        tmp_path, monkeypatch, ["4"], ["14"], ["4"], side_by_side=True, timeout_s=12.0
    )
    assert max(starts) < min(ends[0], ends[2])
    assert list(failures) == ["1"]
    assert "1 did not end within 12 s" in failures["1"]
    assert ends[1] is None


def test_nothing_is_started_after_a_base_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, starts, _ = train(tmp_path, monkeypatch, ["0", "no luck"], ["0"])
    assert list(failures) == ["0"]
    assert starts[1] is None


def test_a_recipe_that_fails_is_a_missed_row_and_the_others_are_compared(tmp_path: Path) -> None:
    trials = [
        command.Trial("BF16", "base", ()),
        command.Trial("twin", "twin", ()),
        command.Trial("FP8 delayed", "compared", ()),
        command.Trial("FP8 blockwise", "compared", ()),
    ]
    variants = [trial.variant([], tmp_path / str(i)) for i, trial in enumerate(trials)]
    for variant in variants[:3]:
        (variant.folder / "run").mkdir(parents=True)
        steps = [make_step(step) for step in range(1, 11)]
        write_metrics(variant.folder / "run" / "metrics.jsonl", steps)
    plan = command.Plan(trials, variants, "cuda")
    rows, table = command._compare(plan, ["FP8 blockwise"], steps=10, bar=BAR, alone=True)
    assert [row["name"] for row in rows if row["ok"] is False] == ["FP8 blockwise: failed"]
    assert table.splitlines()[0] == "| steps | BF16 | twin | FP8 delayed |"


def bench(easy_vqa: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = ["data.seq_length=128", "batch.global_size=2", "optim.warmup_steps=1"]
    settings += [f"data.train={easy_vqa}/train.gvd", "data.heldout=null", "train.device=cpu"]
    return subprocess.run(
        [
            *(sys.executable, "-m", "ghostvis_mega", "bench", "fp8"),
            *("examples/configs/vlm_tiny_easyvqa.yaml", *settings, *options),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "train.fp8=delayed needs a GPU with FP8 units"),
        (["--recipe", "none", "train.precision=fp32"], "train.precision=fp32: bench fp8 sets that"),
        (["--recipe", "none", "--twin", "train.fused_los=true"], "train.fused_loss"),
        (["--recipe", "none", "--steps", "1"], "optim.warmup_steps=1 leaves no step"),
    ],
)
def test_what_is_wrong_is_said_before_any_launch(
    easy_vqa: Path, options: list[str], words: str
) -> None:
    done = bench(easy_vqa, *options)
    assert done.returncode == 2, done.stderr[-3000:]
    assert words in done.stderr
    assert "ranks on" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("options", "code"), [([], 0), (["--fault"], 1)])
def test_the_command(easy_vqa: Path, options: list[str], code: int) -> None:
    """BF16 against BF16, all launches at once; and against BF16 at half the rate."""
    done = bench(easy_vqa, "--recipe=none", "--steps=3", "--side-by-side", "--json", *options)
    assert done.returncode == code, done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    name = "BF16 again" + (", half the rate" if code else "")
    gap = rows[f"{name} against BF16: gap of the last 1 steps"]
    assert gap["ok"] is (code == 0)
    assert code or gap["value"] == 0
    twin = rows["BF16, train.fused_loss=false against BF16: gap of all steps"]
    assert 0 < abs(twin["value"]) < 0.3
    others = [row for row in rows.values() if row["ok"] is not None and row is not gap]
    assert len(others) == 5
    assert all(row["ok"] for row in others)
    assert len(rows["report"]["value"].splitlines()) == 2 + 3


@pytest.mark.slow
def test_a_run_that_fails_is_named(easy_vqa: Path) -> None:
    """The base fails by itself: nothing else is started."""
    done = bench(easy_vqa, "--recipe=none", "--steps=3", "--timeout-s=1")
    assert done.returncode == 1
    assert "BF16 did not end within 1 s" in done.stderr
    assert "nothing to compare" in done.stderr
    assert done.stderr.count("ranks on cpu") == 1
