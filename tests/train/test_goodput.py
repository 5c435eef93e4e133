"""All time since the first launch is in one part each, through kills, resumes and rollbacks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.train.goodput import PARTS, Account, Goodput, read_account
from ghostvis_mega.train.observers import Summary
from ghostvis_mega.train.report import HtmlReport
from ghostvis_mega.train.report.timing import draw_goodput
from tests.launch import ROOT
from tests.train.samples import make_run, make_step

pytestmark = pytest.mark.durability

LAUNCH = """
import json, sys, time
from pathlib import Path
from ghostvis_mega.train.goodput import Goodput
from ghostvis_mega.utils.processes import process_started

folder, total = Path(sys.argv[1]), int(sys.argv[2])
saved = folder / "saved"
goodput = Goodput(folder / "goodput.jsonl", started=process_started())
start = int(saved.read_text()) if saved.exists() else 0
goodput.ready(start=start)
for done in range(start + 1, total + 1):
    began = time.perf_counter()
    time.sleep(0.04)
    seconds = time.perf_counter() - began
    goodput.step(done, seconds=seconds, data=seconds / 4, skipped=done % 10 == 0)
    with open(folder / "steps.jsonl", "a") as file:
        file.write(json.dumps([done, seconds]) + "\\n")
    if done % 50 == 0:
        with goodput.part("save"):
            time.sleep(0.1)
            saved.write_text(str(done))
goodput.write()
"""


def launch(folder: Path, *, total: int, kill_after: int | None) -> None:
    """One process; killed once it has done so many steps in all launches together."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder), str(total)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    log = folder / "steps.jsonl"
    while kill_after is not None:
        time.sleep(0.02)
        if log.exists() and len(log.read_text().splitlines()) >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(timeout=120) == (0 if kill_after is None else -signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 100 steps, killed twice behind its checkpoint after step 50."""
    path = tmp_path_factory.mktemp("goodput")
    launch(path, total=100, kill_after=85)
    launch(path, total=100, kill_after=120)
    launch(path, total=100, kill_after=None)
    return path


def kept_steps(folder: Path) -> dict[int, float]:
    """The time that each step took when it was done for the last time."""
    return dict(json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines())


def test_a_killed_run_knows_where_all_of_its_time_went(folder: Path) -> None:
    account = read_account(folder / "goodput.jsonl")
    assert account.launches == 3
    assert sum(account.seconds.values()) == pytest.approx(account.wall_s, abs=0.01)
    kept = kept_steps(folder)
    assert sorted(kept) == list(range(1, 101))
    trained = sum(seconds for done, seconds in kept.items() if done % 10)
    assert account.seconds["productive"] == pytest.approx(0.75 * trained, abs=0.02)
    assert account.seconds["data"] == pytest.approx(0.25 * trained, abs=0.02)
    assert account.share == pytest.approx(account.seconds["productive"] / account.wall_s)
    assert account.seconds["lost"] > 1.0 and account.seconds["save"] > 0.1
    assert account.seconds["start-up"] > 0.1 and account.seconds["restart"] > 0


def test_an_account_that_forgets_lost_steps_would_be_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Account, "undo", lambda self, step: None)
    account = read_account(folder / "goodput.jsonl")
    trained = sum(seconds for done, seconds in kept_steps(folder).items() if done % 10)
    assert account.seconds["productive"] > 0.75 * trained + 0.1


def account_of(*rows: dict[str, Any]) -> Account:
    account = Account()
    for row in rows:
        account.add(row)
    return account


def test_parts_by_hand() -> None:
    account = account_of(
        {"kind": "launch", "time": 100.0},
        {"kind": "ready", "time": 110.0, "step": 0},
        {"kind": "time", "time": 120.0, "first": 1, "last": 4, "productive": 6.0, "data": 2.0},
        {"kind": "time", "time": 123.0, "first": 5, "last": 4, "save": 3.0},
        {"kind": "time", "time": 133.0, "first": 5, "last": 8, "productive": 8.0, "skipped": 1.0},
        {"kind": "launch", "time": 140.0},
        {"kind": "ready", "time": 145.0, "step": 6},
        {"kind": "time", "time": 150.0, "first": 7, "last": 10, "productive": 4.0},
        {"kind": "undone", "time": 151.0, "step": 4},
    )
    expected = dict.fromkeys(PARTS, 0.0) | {
        "productive": 6.0,
        "data": 2.0,
        "start-up": 15.0,
        "save": 3.0,
        "skipped": 1.0,
        "lost": 12.0,
        "restart": 7.0,
        "other": 2 + 1 + 1 + 1,
    }
    assert account.seconds == pytest.approx(expected)
    assert account.wall_s == 51.0 and account.share == pytest.approx(6 / 51)


def test_a_torn_line_and_a_clock_set_back_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    lines = ('{"kind": "launch", "time": 100.0}', '{"kind": "ready", "time": 104.0, "step": 0}')
    path.write_text("\n".join((*lines, '{"kind": "ti')))
    Goodput(path, started=90.0)
    account = read_account(path)
    assert account.launches == 2
    assert account.wall_s == 4.0 and account.seconds["start-up"] == 4.0
    assert min(account.seconds.values()) >= 0


def rows_of_launch(clock: float, *, done: int) -> list[dict[str, Any]]:
    """100 s of a launch after `done` steps, 90 of them for 18 more, by its node's clock."""
    return [
        {"kind": "launch", "time": clock},
        {"kind": "ready", "time": clock + 10, "step": done},
        {"kind": "time", "time": clock + 55, "first": done + 1, "last": done + 9, "productive": 45},
        {"kind": "time", "time": clock + 100, "first": done + 10, "last": done + 18,
         "productive": 45},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("clocks", "wall"),
    [
        ([0, 110], 210),
        # A node that is behind by 60 s, once also for another launch; how long the time between
        # the launches was is not to be known.
        ([0, 50], 200),
        ([0, -9000, -8890], 310),
        # The first node again, whose clock knows how long all that took.
        ([0, 50, 220], 320),
    ],
)
def test_time_passes_too_on_a_node_whose_clock_is_behind(clocks: list[float], wall: float) -> None:
    launches = [
        rows_of_launch(1e6 + clock, done=18 * number) for number, clock in enumerate(clocks)
    ]
    account = account_of(*(row for rows in launches for row in rows))
    assert account.wall_s == wall == sum(account.seconds.values())
    assert account.seconds["productive"] == 90 * len(clocks)
    assert account.seconds["start-up"] == 10 * len(clocks)
    assert account.share == 90 * len(clocks) / wall < 1


def test_a_launch_whose_clock_is_behind_tells_its_share(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    ahead = time.time() + 1000
    path.write_text("".join(f"{json.dumps(r)}\n" for r in rows_of_launch(ahead - 100, done=0)))
    goodput = Goodput(path)
    goodput.ready(start=18)
    began = time.monotonic()
    while goodput.account.wall_s < 101:
        time.sleep(0.1)
        goodput.step(19, seconds=0.05, data=0.0, skipped=False)
        assert time.monotonic() - began < 30, "no line is written any more"
    assert 0.6 < goodput.share < 0.91
    assert read_account(path).wall_s == goodput.account.wall_s


def test_the_report_shows_every_part_that_took_time() -> None:
    seconds = dict.fromkeys(PARTS, 0.0) | {"productive": 80.0, "start-up": 15.0, "lost": 5.0}
    page = draw_goodput(Summary(goodput=0.8, goodput_seconds=seconds))
    assert "Goodput 80.0 % of 1m40s" in page
    assert all(f">{name}<" in page for name in ("productive", "start-up", "lost"))
    assert ">restart<" not in page
    assert draw_goodput(Summary()) == draw_goodput(Summary(status="finished")) == ""


def test_the_report_of_a_run_that_goes_on_has_it_too(tmp_path: Path) -> None:
    goodput = Goodput(None)
    report = HtmlReport(tmp_path / "index.html", every=1, account=goodput.summary)
    report.on_start(make_run())
    goodput.ready(start=11)
    time.sleep(0.05)
    goodput.step(12, seconds=0.04, data=0.01, skipped=False)
    goodput.write()
    report.on_step(make_step())
    page = (tmp_path / "index.html").read_text()
    assert "Where the time of the run went" in page and ">productive<" in page
