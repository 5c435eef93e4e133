"""One live launch a run folder: a race of processes, dead holders, other nodes, no locks at all."""

import errno
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.checkpoint import lock as module
from ghostvis_mega.checkpoint.lease import LEASE_FILE, Lease, Start, own_start, read_holder
from ghostvis_mega.checkpoint.lock import LOCK_FILE, FolderLock, in_use
from tests.launch import ROOT

pytestmark = pytest.mark.durability

RACERS = 6
RACE = """
import fcntl, sys, time
from pathlib import Path
from ghostvis_mega.checkpoint import lock
lock._DYING_S = 0.3
if sys.argv[2] == "broken":
    fcntl.flock = lambda descriptor, kind: None
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
one = lock.FolderLock(Path(sys.argv[1]))
print(one.take() is None, flush=True)
sys.stdin.read()
"""


def race(folder: Path, kind: str) -> list[subprocess.Popen]:
    """Processes that reach for the folder at the same time and keep what they get."""
    command = [sys.executable, "-c", RACE, str(folder), kind, repr(time.time() + 1.5)]
    return [
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(RACERS)
    ]


@pytest.mark.parametrize(("kind", "winners"), [("sound", 1), ("broken", RACERS)])
def test_of_several_processes_one_gets_the_folder(tmp_path: Path, kind: str, winners: int) -> None:
    racers = race(tmp_path / "run", kind)
    try:
        got = [one.stdout.readline().strip() for one in racers]  # type: ignore[union-attr]
        assert sorted(got) == ["False"] * (RACERS - winners) + ["True"] * winners
        if kind == "sound":
            winner = racers[got.index("True")]
            assert "a launch that has just begun" in (in_use_soon(tmp_path / "run") or "")
            winner.kill()  # SIGKILL: what it holds goes back by itself
            winner.wait()
            began = time.monotonic()
            mine = FolderLock(tmp_path / "run")
            assert mine.take() is None
            assert time.monotonic() - began < 1
            mine.release()
    finally:
        for one in racers:
            one.kill()
            one.communicate()


def in_use_soon(folder: Path) -> str | None:
    """`in_use` without its patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_DYING_S", 0.3)
        return in_use(folder)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A run folder that a living launch has, by a descriptor of its own."""
    folder = tmp_path / "run"
    living = FolderLock(folder)
    assert living.take() is None
    Lease(folder, launch="first").take()
    yield folder
    living.release()


def rename_host(folder: Path, host: str, **more: Any) -> None:
    document = json.loads((folder / LEASE_FILE).read_text())
    (folder / LEASE_FILE).write_text(json.dumps(document | {"host": host} | more))


def test_the_refusal_names_the_launch_and_writes_nothing(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DYING_S", 0.3)
    before = {path.name: path.stat().st_mtime_ns for path in held.iterdir()}
    for problem in (in_use(held), FolderLock(held).take()):
        assert problem == (
            f"log.output={held} is in use by launch first on {socket.gethostname()}, which is "
            "still alive (it holds launch.lock). Wait for its end or stop it, or give this run a "
            "log.output of its own."
        )
    assert {path.name: path.stat().st_mtime_ns for path in held.iterdir()} == before


def test_a_folder_without_a_lock_or_with_a_dead_one_is_free(tmp_path: Path) -> None:
    assert in_use(tmp_path / "new") is None and not (tmp_path / "new").exists()
    folder = tmp_path / "run"
    first = FolderLock(folder)
    assert first.take() is None
    Lease(folder, launch="first").take()
    rename_host(folder, "a-node-that-died")
    first.release()
    began = time.monotonic()
    assert in_use(folder) is None and FolderLock(folder).take() is None
    assert time.monotonic() - began < 1


def test_another_node_gets_the_time_that_its_death_takes(
    held: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename_host(held, "n17")
    monkeypatch.setattr(module, "_DYING_S", 0.2)
    monkeypatch.setattr(module, "_UNREACHABLE_S", 1.0)
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        problem = FolderLock(held).take()
    assert time.monotonic() - began > 1.0
    assert "launch first on n17, which is still alive" in (problem or "")
    assert caplog.text.count("waiting up to 1 s, for that node may have died") == 1


@pytest.mark.parametrize(
    ("job", "restart", "let_in"), [("7", 1, True), ("7", 0, False), ("8", 1, False), ("", 1, False)]
)
def test_a_later_start_of_the_same_slurm_job_need_not_wait(
    held: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    job: str,
    restart: int,
    let_in: bool,
) -> None:
    monkeypatch.setattr(module, "_UNREACHABLE_S", 0.3)
    rename_host(held, "n17", job="7", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    with caplog.at_level(logging.WARNING):
        assert (FolderLock(held).take() is None) == let_in
    assert ("an earlier start of this Slurm job" in caplog.text) == let_in
    if let_in:
        Lease(held, launch="second").take()
        found = read_holder(held)
        assert found is not None and found.start == Start("7", 1) and found.launch == "second"


def test_a_start_outside_slurm_has_no_job() -> None:
    assert own_start({}) == Start("", 0)
    assert own_start({"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "x"}) == Start("9", 0)
    assert not Start("", 1).follows(Start("", 0))


def test_a_file_system_without_locks_is_a_warning(
    held: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING):
        assert FolderLock(held).take() is None
    assert "a second launch here would not be refused" in caplog.text
    assert (held / LOCK_FILE).is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"launch": 3, "host": "x"}', '{"launch": "a"}'])
def test_a_launch_that_cannot_be_read_is_not_named(held: Path, text: str) -> None:
    (held / LEASE_FILE).write_text(text)
    assert read_holder(held) is None
    assert "is in use by a launch that has just begun, which" in (in_use_soon(held) or "")
