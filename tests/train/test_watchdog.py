"""A process that hangs is ended, with its name; one that works is left alone."""

import subprocess
import sys
import time

import pytest

from ghostvis_mega.train.watchdog import EXIT_CODE

pytestmark = pytest.mark.durability

PROCESS = """
import sys, time
from ghostvis_mega.train.watchdog import Watchdog

def wait_for_ever():
    time.sleep(60)

def work():
    for step in range(12):
        watchdog.alive(f"step {step}")
        time.sleep(0.1)

watchdog = Watchdog(timeout_s=0.6, rank=3)
watchdog.alive("step 12")
wait_for_ever() if sys.argv[1] == "hang" else work()
watchdog.close()
time.sleep(0.8)
print("done")
"""


def start(what: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, what], capture_output=True, text=True, timeout=50
    )
    return done, time.monotonic() - began


def test_a_hang_ends_with_its_name_and_the_stack() -> None:
    done, seconds = start("hang")
    assert done.returncode == EXIT_CODE == 70
    assert seconds < 30
    assert "rank 3 hangs in step 12: no progress for 1 s (train.timeout_s)" in done.stderr
    assert "in wait_for_ever" in done.stderr
    assert done.stdout == ""


def test_a_process_that_reports_and_then_stops_the_watch_lives() -> None:
    done, _ = start("work")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
