"""The command: nothing starts with a wrong setting; what ran is a table or JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ghostvis_mega.cli import bench_train as command
from ghostvis_mega.cli.main import app
from ghostvis_mega.perf.train_bench.launches import Order
from ghostvis_mega.perf.train_bench.results import RowResult, StepRecord, failed

RUN = "examples/configs/vlm_tiny_easyvqa.yaml"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "train", *arguments])


class Launches:
    """Stands in for the launches of rows."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.broken = ""
        self.seconds: dict[str, float] = {}

    def __call__(self, order: Order, **_: Any) -> RowResult:
        self.orders.append(order)
        if order.row.name == self.broken:
            return failed(order.row, "OutOfMemoryError: CUDA out of memory.")
        seconds = self.seconds.get(order.row.name, 1.0)
        steps = [
            StepRecord(9.0 - n, 100, 99, 0, 1e12, 0.0, 0.0, {}, seconds)
            for n in range(order.warm_up + order.steps)
        ]
        return RowResult(order.row.name, order.row.kind, warm_up=order.warm_up, steps=steps)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    stand_in = Launches()
    monkeypatch.setattr(command, "run_row", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "give either a run file or --preset"),
        ((RUN,), "there is nothing to time"),
        (("--preset", "tiny", "--only", "theirs"), "--only 'theirs' is no row"),
        (("--preset", "text-7b", "--processes", "3"), "is for 2 or 4 processes, not 3"),
        (("--preset", "tiny", "--ratio", "ours / theirs"), "names 'theirs', which is no row"),
        (("--preset", "tiny", "--row", "x: peer=y"), "peer=y is unknown"),
        ((RUN, "--row", "a: train.stepz=1"), "row 'a': train.stepz is not a setting"),
        ((RUN, "--seq-length", "8", "--row", "a:"), "--seq-length is for presets"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(
    launches: Launches, tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    result = call(*arguments, "--data", str(tmp_path / "data"))
    assert result.exit_code == 2, result.output
    assert word in " ".join(result.output.split())
    assert launches.orders == []


def test_all_rows_are_checked_before_the_first_starts(
    launches: Launches, tmp_path: Path, easy_vqa: Path
) -> None:
    good, data = "good:", f"data.train={easy_vqa}/train.gvd"
    bad = ("bad: peer=hf", "worse: parallel.tensor=3")
    rows = [part for row in (good, *bad) for part in ("--row", row)]
    result = call(RUN, data, "batch.global_size=8", *rows)
    told = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "row 'bad': peer=hf computes rows of one sample each" in told
    assert "row 'worse': parallel.tensor=3" in told
    assert launches.orders == []


def run_tiny(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    only = ("--only", "ours", "--only", "naive", "--steps", "2", "--warm-up", "1")
    folder = ("--data", str(tmp_path / "data"))
    result = call("--preset", "tiny", *only, *folder, *arguments, "--json")
    rows = json.loads(result.stdout.strip().splitlines()[-1])
    return result.exit_code, {row["name"]: row for row in rows}


def test_rows_run_one_after_the_other_and_are_compared(launches: Launches, tmp_path: Path) -> None:
    launches.seconds = {"naive": 4.0}
    code, rows = run_tiny(tmp_path)
    assert code == 0
    assert [order.row.name for order in launches.orders] == ["ours", "naive"]
    assert rows["ours / naive, model FLOPs"]["value"] == pytest.approx(4.0)
    assert rows["naive: step, median"]["value"] == 4.0
    assert "VLM / ours, model FLOPs" not in rows
    run = launches.orders[0].run
    assert run.train.steps == 3
    assert not run.checkpoint.save_at_end


def test_a_missed_ratio_ends_with_1(launches: Launches, tmp_path: Path) -> None:
    assert run_tiny(tmp_path, "--ratio", "ours / naive >= 0.9")[0] == 0
    code, rows = run_tiny(tmp_path, "--ratio", "ours / naive >= 1.1")
    assert code == 1
    assert rows["ours / naive, model FLOPs"]["ok"] is False


def test_a_row_that_fails_is_a_row_and_the_others_go_on(launches: Launches, tmp_path: Path) -> None:
    launches.broken = "ours"
    code, rows = run_tiny(tmp_path)
    assert code == 1
    assert rows["ours: failed"]["value"] == "OutOfMemoryError: CUDA out of memory."
    assert rows["naive: step, median"]["value"] == 1.0


def test_the_table_names_misses_and_failures(launches: Launches, tmp_path: Path) -> None:
    launches.broken = "naive"
    result = call(
        *("--preset", "tiny", "--only", "ours", "--only", "naive"),
        *("--data", str(tmp_path / "data"), "--ratio", "ours / naive >= 2"),
    )
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert "naive: OutOfMemoryError: CUDA out of memory." in told
    assert "causal attention halved" in told
    assert "torch 2" in told


def test_a_row_really_runs(tmp_path: Path) -> None:
    """A launch of its own, with a trace: the whole way from a preset to figures."""
    traces = tmp_path / "traces"
    result = call(
        *("--preset", "tiny", "--only", "ours", "--steps", "2", "--warm-up", "1", "--json"),
        *("--data", str(tmp_path / "data"), "--trace", str(traces)),
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout.strip().splitlines()[-1])}
    assert rows["ours: step, median"]["value"] > 0
    assert rows["ours: time in llm"]["value"] > 0
    assert rows["ours: loss of the last step"]["ok"] is True
    assert rows["ours: traced, GEMM"]["value"] > 0
    assert (traces / "ours-rank0.json.gz").is_file()
    assert rows["version of torch"]["value"]
