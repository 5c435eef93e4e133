"""The console's line, the JSON lines, and the optional tools."""

import importlib.util
import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.config.schema import LogConfig
from ghostvis_mega.train.observers import ConsoleLine, JsonLines, TensorBoard, Wandb
from ghostvis_mega.train.observers.build import make_observers
from ghostvis_mega.train.observers.console import format_step
from ghostvis_mega.utils.errors import DataError, MissingDependencyError
from tests.train.samples import make_preview, make_run, make_step


def line(**changes: Any) -> str:
    """The console line of a sample step, MFU and ETA fixed."""
    return format_step(
        make_step(**changes), total_steps=1000, smooth_loss=1.3, mfu=0.412, eta_s=187
    )


def test_console_line_golden() -> None:
    assert line() == (
        "step   12/1000  loss  1.2500 (1.3000)  lr llm 1.0e-03 vis 1.0e-04 proj 5.0e-04  "
        "norm   0.875  16.0k tok/s    600 img/s  MFU 41.2 %  data  10 ms  eta 3m07s"
    )


def test_console_line_without_a_known_peak_has_no_mfu_and_equal_rates_are_one() -> None:
    text = format_step(
        make_step(lr={"llm": 3e-4, "vision": 3e-4}),
        total_steps=100,
        smooth_loss=1.0,
        mfu=None,
        eta_s=math.nan,
    )
    assert "MFU" not in text
    assert "  lr 3.0e-04  " in text
    assert text.endswith("eta -")


def test_console_columns_stay_in_place() -> None:
    starts = {
        line(step=step, loss=loss, grad_norm=norm).index("tok/s")
        for step, loss, norm in ((1, 0.01, 0.5), (1000, 11.5, 120.25), (77, math.nan, math.inf))
    }
    assert len(starts) == 1


def test_console_logs_every_nth_the_first_the_last_and_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="ghostvis_mega")
    console = ConsoleLine(every=10)
    console.on_start(make_run(total_steps=25))
    for step in range(1, 26):
        console.on_step(make_step(step=step, skipped=step == 13))
    console.on_preview(25, [make_preview(), make_preview(answer="blue")])
    console.on_end({"heldout_accuracy": 0.9, "question_only_accuracy": 0.67, "seconds": 61.0})
    lines = [record.getMessage() for record in caplog.records]
    steps = [text.split("/")[0].split()[1] for text in lines if text.startswith("step")]
    assert steps == ["1", "10", "13", "20", "25"]
    (skipped,) = [r for r in caplog.records if "SKIPPED" in r.getMessage()]
    assert skipped.levelno == logging.WARNING
    assert "preview at step 25: 1 of 2 answers right" in lines[-3]
    assert lines[-2] == "held-out accuracy 90.0 % (best guess from the question alone: 67.0 %)"
    assert lines[-1] == "finished after 1m01s"


def write_steps(path: Path, *, start: int, stop: int) -> None:
    """Metrics of steps start+1 to stop, as a run that resumed after `start` writes them."""
    observer = JsonLines(path)
    observer.on_start(make_run(start_step=start))
    for step in range(start + 1, stop + 1):
        observer.on_step(make_step(step=step, loss=float(start)))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_json_lines_hold_the_step_and_its_rates_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write_steps(path, start=0, stop=2)
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["tokens_per_s"] == 16_000
    assert rows[0]["images_per_s"] == 600
    assert rows[0]["mfu"] is None


def test_resume_appends_and_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, start=0, stop=5)
    write_steps(path, start=3, stop=6)
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [0, 0, 0, 3, 3, 3]


def test_a_fresh_run_does_not_continue_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, start=0, stop=5)
    write_steps(path, start=0, stop=2)
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_torn_last_line_is_dropped_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, start=0, stop=3)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    write_steps(path, start=3, stop=4)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", *lines[2:], ""]))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2, is not the metrics of a step"):
        write_steps(path, start=3, stop=4)


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make one package look as if it were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else real(name, *rest),
    )


def test_missing_packages_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "tensorboard")
    with pytest.raises(MissingDependencyError) as error:
        make_observers(LogConfig(output=tmp_path, tensorboard=True), rank=0)
    assert str(error.value) == (
        "log.tensorboard=true needs tensorboard: pip install -e '.[tensorboard]'"
    )
    hide(monkeypatch, "wandb")
    with pytest.raises(MissingDependencyError) as error:
        make_observers(LogConfig(output=tmp_path, wandb="online"), rank=0)
    assert str(error.value) == "log.wandb=online needs wandb: pip install -e '.[wandb]'"


def test_only_rank_0_observes_and_optional_tools_are_off_by_default(tmp_path: Path) -> None:
    config = LogConfig(output=tmp_path)
    assert make_observers(config, rank=1).members == ()
    names = [type(member).__name__ for member in make_observers(config, rank=0).members]
    assert names == ["ConsoleLine", "JsonLines", "HtmlReport"]


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    observer = TensorBoard(tmp_path)
    observer.on_start(make_run())
    observer.on_step(make_step(step=1))
    observer.on_step(make_step(step=2, loss=0.5))
    observer.on_preview(2, [make_preview()])
    observer.on_end({"heldout_accuracy": 0.75, "status": "finished"})
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "lr/llm",
        "timing/data_s",
        "dispatch/imbalance",
        "summary/heldout_accuracy",
    } <= set(tags["scalars"])
    assert "speed/mfu" not in tags["scalars"]
    assert [e.value for e in events.Scalars("train/loss")] == [1.25, 0.5]
    assert tags["images"] == ["preview/0"]


class FakeWandbRun:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.finished = False

    def log(self, row: dict[str, Any], *, step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


def test_wandb_is_offline_and_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeWandbRun()
    seen: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeWandbRun:
        seen.update(arguments)
        return run

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    vars(module)["init"] = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    observer = Wandb(tmp_path / "wandb")
    observer.on_start(make_run())
    observer.on_step(make_step(step=7))
    observer.on_end({"heldout_accuracy": 0.75})
    assert seen["mode"] == "offline"
    assert seen["config"]["train"]["steps"] == 100
    assert (run.rows[0][0], run.rows[0][1]["train/loss"]) == (7, 1.25)
    assert run.summary == {"heldout_accuracy": 0.75}
    assert run.finished
