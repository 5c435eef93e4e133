"""The drills of signals and hangs, small and on CPUs; and that they can fail."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.perf.fault_drills import judge_report
from ghostvis_mega.perf.fault_run import lost_or_repeated
from ghostvis_mega.utils.figures import any_missed
from tests.checkpoint.test_drills import drill
from tests.launch import ROOT

pytestmark = pytest.mark.world_size(2)

REPORT = """\
hang: rank 1 does not answer.
  rank 0: in step 4 for 11 s; last call: allreduce of 2 int64 in group world, call 41 (a.py:1), 11 s ago
  rank 2: in step 4 for 11 s; last call: allreduce of 2 int64 in group world, call 41 (a.py:1), 11 s ago
  rank 1: no word; stopped, dead or without the run folder
stacks of rank 0:
File a
stacks of rank 2:
File b
"""  # noqa: E501


def missed(rows: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in rows.items() if row["ok"] is False}


def test_a_signal_to_one_rank_saves_and_the_next_start_goes_on() -> None:
    code, rows, said = drill("signals")
    assert code == 0, said[-4000:]
    assert rows["steps after the signal"]["value"] in (0, 1)
    assert rows["goes on after step"]["value"] >= 3


def test_a_run_that_is_killed_instead_misses_the_bars() -> None:
    code, rows, said = drill("signals", "--processes", "1", "--fault")
    assert code == 1, said[-4000:]
    assert missed(rows) == {
        "ranks that ended otherwise than with 85",
        "steps that are in no checkpoint",
        "goes on after step",
    }


@pytest.mark.durability
def test_a_stopped_rank_is_reported_and_the_next_start_goes_on() -> None:
    code, rows, said = drill("hang", "--step-timeout-s", "12")
    assert code == 0, said[-4000:]
    assert 11 < rows["from the stop to the report"]["value"] <= 17
    assert rows["from the stop to the report"]["bar"] == 17
    last_call = rows["last call of the first other rank"]["value"]
    assert re.search(r"last call: \w+ of .* in group (world|data), call \d+ ", last_call)


@pytest.mark.parametrize(
    ("change", "sound"),
    [
        (("", ""), True),
        (("hang: rank 1 does", "hang: rank 2 does"), False),
        (("rank 2: in step 4 for 11 s; last call: ", "rank 2: in step 4, "), False),
        (("stacks of rank 2:\n", ""), False),
    ],
)
def test_a_report_is_held_to_all_that_it_must_say(change: tuple[str, str], sound: bool) -> None:
    rows = judge_report(REPORT.replace(*change), rank=1, processes=3)
    assert any_missed(rows) != sound


@pytest.mark.parametrize(
    ("steps", "wrong"), [([1, 2, 3], 0), ([1, 3], 1), ([1, 2, 2, 3], 1), ([1, 2, 3, 4], 1)]
)
def test_each_step_counts_once(steps: list[int], wrong: int) -> None:
    assert lost_or_repeated([{"step": step} for step in steps], steps=3) == wrong


def test_a_wrong_setting_is_one_sentence_before_any_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ghostvis_mega", "drill", "hang", "--out", str(tmp_path)]
    for more, says in (
        (["train.stepps=3"], "Did you mean train.steps?"),
        (["--processes", "1"], "nobody would wait for rank 1"),
    ):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr
    assert not list(tmp_path.iterdir())
