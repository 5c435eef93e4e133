"""The drill's figures follow from the run's account; bars that are missed are seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ghostvis_mega.perf.goodput_drill import figures_of
from tests.launch import ROOT

pytestmark = pytest.mark.durability

LINES = [
    {"kind": "launch", "time": 0.0},
    {"kind": "ready", "time": 4.0, "step": 0},
    {"kind": "time", "time": 5.0, "first": 1, "last": 4, "productive": 1.0},
    {"kind": "time", "time": 59.0, "first": 5, "last": 90, "productive": 53.0, "save": 1.0},
    {"kind": "launch", "time": 60.0},
    {"kind": "ready", "time": 66.0, "step": 85},
    {"kind": "time", "time": 70.0, "first": 86, "last": 90, "productive": 4.0},
    {"kind": "time", "time": 120.0, "first": 91, "last": 190, "productive": 50.0},
]


def write(folder: Path, lines: list[dict]) -> Path:
    (folder / "run").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "run" / "goodput.jsonl").write_text(text)
    return folder


def test_figures_of_an_account(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in figures_of(write(tmp_path, LINES), kills=2)}
    lost = 53.0 * 5 / 86
    assert rows["goodput"]["value"] == pytest.approx((108 - lost) / 120)
    assert rows["slowest start of a process to its first step"]["value"] == 10.0
    assert rows["lost"]["value"] == pytest.approx(lost)
    assert rows["launches"]["value"] == 2
    assert {row["ok"] for row in rows.values()} == {True, None}


def test_missed_bars_are_seen(tmp_path: Path) -> None:
    late = [line | {"time": line["time"] + 30} if n else line for n, line in enumerate(LINES)]
    rows = {row["name"]: row for row in figures_of(write(tmp_path, late), kills=3)}
    missed = {name for name, row in rows.items() if row["ok"] is False}
    assert missed == {"goodput", "launches", "slowest start of a process to its first step"}


def test_a_launch_that_never_trained_is_no_fast_start(tmp_path: Path) -> None:
    again = [*LINES, {"kind": "launch", "time": 121.0}]
    rows = {row["name"]: row for row in figures_of(write(tmp_path, again), kills=3)}
    assert [name for name, row in rows.items() if row["ok"] is False] == ["launches without a step"]
    (tmp_path / "run" / "goodput.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    rows = {row["name"]: row for row in figures_of(tmp_path, kills=1)}
    start = rows["slowest start of a process to its first step"]
    assert (start["value"], start["ok"]) == (None, False)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_run_that_is_killed_comes_back_and_knows_its_time(tmp_path: Path) -> None:
    options = ["--seconds", "100", "--kill-every", "50", "--folder", str(tmp_path / "drill")]
    command = [sys.executable, "-m", "ghostvis_mega", "drill", "goodput", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["seconds in no part, or in two"]["ok"] and rows["launches"]["ok"], done.stderr
    assert rows["kills"]["value"] == 2 and rows["productive"]["value"] > 0
    # How much of it was training depends on the machine; the command judges.
    assert done.returncode == (0 if all(row["ok"] is not False for row in rows.values()) else 1)
