"""The command: nothing starts with a wrong setting; what ran is a table or JSON."""

import json
import logging
import signal
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
        self.signals: dict[str, signal.Signals] = {}
        """Sent while the row runs."""

    def __call__(self, order: Order, **_: Any) -> RowResult:
        self.orders.append(order)
        if order.row.name == self.broken:
            return failed(order.row, "OutOfMemoryError: CUDA out of memory.")
        if order.row.name in self.signals:
            signal.raise_signal(self.signals[order.row.name])
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


def test_a_row_that_may_not_fit_is_no_failure(launches: Launches, tmp_path: Path) -> None:
    only = ("--only", "ours", "--only", "big", "--data", str(tmp_path / "data"))
    launches.broken = "big"
    for words, code in (("may-not-fit", 0), ("", 1)):
        row = f"big: peer=naive {words} data.packing=false data.train={tmp_path}/data"
        row += "/text-128-64.gvd model.vision=null model.connector=null data.seq_length=128"
        result = call("--preset", "tiny", *only, "--row", row)
        assert result.exit_code == code, result.output
        assert "big: OutOfMemoryError: CUDA out of memory." in " ".join(result.output.split())


def test_each_row_is_told_and_saved_as_soon_as_it_has_ended(
    launches: Launches, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    file, seen = tmp_path / "kept" / "result.json", []

    def looking(order: Order, **kept: Any) -> RowResult:
        saved = json.loads(file.read_text())
        told = [r.getMessage() for r in caplog.records if "useful tokens" in r.getMessage()]
        seen.append(([row["name"] for row in saved["rows"]], told))
        return launches(order, **kept)

    monkeypatch.setattr(command, "run_row", looking)
    with caplog.at_level(logging.INFO):
        code, _ = run_tiny(tmp_path, "--save", str(file))
    assert code == 0
    (before, nothing), (between, (line,)) = seen
    assert (before, nothing, between) == ([], [], ["ours"])
    assert line.startswith("ours: useful tokens 100 /s/GPU; model FLOPs 1 TFLOP/s/GPU")
    saved = json.loads(file.read_text())
    assert [row["name"] for row in saved["rows"]] == ["ours", "naive"]
    assert saved["rows"][0]["steps"][2]["loss"] == 7.0
    assert "ours / naive, model FLOPs" in {figure["name"] for figure in saved["figures"]}
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_what_is_there(
    launches: Launches, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    launches.signals = {"naive": number}
    before = signal.getsignal(number)
    ended, rows = run_tiny(tmp_path, "--save", str(tmp_path / "result.json"))
    assert ended == code
    assert rows["ours: step, median"]["value"] == 1.0
    assert rows["naive: failed"]["value"] == f"stopped by {number.name}"
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["failure"] for row in saved["rows"]] == ["", f"stopped by {number.name}"]
    assert signal.getsignal(number) is before
    launches.signals = {}
    assert run_tiny(tmp_path)[0] == 0, "without a signal the same call ends well"


def test_a_place_that_cannot_be_written_is_refused_first(launches: Launches, tmp_path) -> None:
    result = call("--preset", "tiny", "--data", str(tmp_path / "data"), "--save", str(tmp_path))
    assert result.exit_code == 2
    assert "is a directory: give the name of a file" in " ".join(result.output.split())
    assert launches.orders == []


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
