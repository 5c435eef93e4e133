"""A disk that is slow is waited for, one that has stopped is a hang, and a rank without room for
its part of a save fails with all others."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint import saving, store, tensors
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.snapshot import HostBuffers
from ghostvis_mega.checkpoint.store import CheckpointStore, load_weights
from ghostvis_mega.checkpoint.tensors import differs, write_buffer
from ghostvis_mega.train import progress
from ghostvis_mega.train.hang import own_state
from ghostvis_mega.train.progress import Progress
from ghostvis_mega.train.watchdog import Watchdog
from tests.checkpoint.test_saving import FakeEngine, snapshot_of
from tests.checkpoint.tiny import NAME, write_tiny
from tests.launch import ROOT

TIMEOUT_S = 1.2
PIECES = 12
PIECE_S = 0.2
TWO_RANKS = Path(__file__).with_name("unequal_ranks.py")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(store, "take_snapshot", snapshot_of)
    monkeypatch.setattr(store, "make_buffers", lambda engine: HostBuffers(pinned=False))
    monkeypatch.setattr(progress, "TICK_S", 0.05)
    return FakeEngine()


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the watchdogs of this process call a hang, instead of ending the process."""
    found: list[str] = []

    def end(self: Watchdog, silent_s: float) -> None:
        found.append(self._doing)
        self._stop.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    return found


def slowly(moved: Callable[[int], None], *, stuck: bool) -> None:
    """Twice as long as a hang takes to be found."""
    for _ in range(PIECES):
        time.sleep(PIECE_S)
        moved(0 if stuck else 1)


@pytest.mark.parametrize(
    ("where", "stuck"),
    [("write_buffer", False), ("differs", False), ("write_buffer", True)],
)
def test_a_slow_save_is_waited_for_and_one_that_stopped_is_a_hang(
    engine: FakeEngine,
    hangs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    stuck: bool,
):
    real = getattr(saving, where)

    def slow(*args: Any, moved: Callable[[int], None]) -> Any:
        slowly(moved, stuck=stuck)
        return real(*args, moved=moved)

    watchdog = Watchdog(timeout_s=TIMEOUT_S, rank=0)
    checkpoints = CheckpointStore(tmp_path, keep=1, progress=watchdog.progress)
    monkeypatch.setattr(saving, where, slow)
    checkpoints.begin(engine, step=1, extra={})
    watchdog.alive("the end of the last save")
    checkpoints.close()
    watchdog.close()
    assert hangs == (["the end of the last save"] if stuck else [])


@pytest.mark.parametrize(
    ("what", "stuck"), [("resume", False), ("weights", False), ("resume", True)]
)
def test_a_slow_restore_is_waited_for_and_one_that_stopped_is_a_hang(
    engine: FakeEngine,
    hangs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    stuck: bool,
):
    def read(reader: CheckpointReader, *_: Any, **__: Any) -> None:
        slowly(reader._moved, stuck=stuck)

    engine.groups = None
    engine.run = SimpleNamespace(model=SimpleNamespace(modules=("llm",)))
    for name in ("resume_problems", "weight_problems", "model_parameters", "layout_of"):
        monkeypatch.setattr(store, name, lambda *_, **__: None)
    for name in ("restore", "restore_weights", "_restore_own", "layout_change"):
        monkeypatch.setattr(store, name, lambda *_, **__: None)
    monkeypatch.setattr(store, "_verify", read)
    path = write_tiny(tmp_path / "step-00000003")
    watchdog = Watchdog(timeout_s=TIMEOUT_S, rank=0)
    watchdog.alive("the restore")
    if what == "resume":
        CheckpointStore(tmp_path, keep=1, progress=watchdog.progress).resume("auto", engine)
    else:
        load_weights(path, engine, progress=watchdog.progress)
    watchdog.close()
    assert hangs == (["the restore"] if stuck else [])


@pytest.mark.world_size(2)
def test_what_fails_or_is_slow_on_one_rank_does_so_for_both(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(TWO_RANKS), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for told in json.loads(done.stdout):
        assert told["prepare"] == told["begin"] == ["no room on rank 1"]
        assert told["saved"] == ["step-00000002", "step-00000003"]
        # The first rank has only waited for the second one's disk.
        assert told["seconds"] > told["timeout_s"]


def test_a_save_tells_of_every_byte_written_hashed_and_read_back(
    engine: FakeEngine, tmp_path: Path
):
    checkpoints = CheckpointStore(tmp_path, keep=1)
    path = checkpoints.save(engine, step=1, extra={})
    size = (path / "llm-00000.safetensors").stat().st_size
    assert checkpoints.progress._moved == 3 * size
    checkpoints.close()


def test_a_reader_tells_of_every_byte(tmp_path: Path):
    read: list[int] = []
    with CheckpointReader(write_tiny(tmp_path / "one"), moved=read.append) as reader:
        assert reader.damage(reader.files()) == []
        assert sum(read) == sum(info.bytes for info in reader.manifest.files.values())
        read.clear()
        reader.weight(NAME)
        assert sum(read) == 8 * 6 * 4


def test_a_large_file_is_brought_to_the_disk_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    content, synced, moved = torch.arange(250).to(torch.uint8), [], []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(tensors, "_SYNC_BYTES", 100)
    monkeypatch.setattr(tensors, "_PIECE_BYTES", 32)
    write_buffer(tmp_path / "file", content, moved=moved.append)
    assert moved == [100, 100, 50]
    # The next portion is written meanwhile.
    assert all(100 * (n + 1) <= size for n, size in enumerate(synced[:2]))
    assert len(synced) == 3 and synced[2] == 250
    assert (tmp_path / "file").read_bytes() == bytes(range(250))
    moved.clear()
    assert not differs(tmp_path / "file", content, moved=moved.append)
    assert sum(moved) == 250


@pytest.mark.parametrize("shared", [True, False])
def test_a_rank_that_is_done_sees_that_others_are_not(
    monkeypatch: pytest.MonkeyPatch, shared: bool
):
    common = dist.HashStore()
    monkeypatch.setattr(progress, "TICK_S", 0.02)
    monkeypatch.setattr(dist, "is_initialized", lambda: shared)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: common)
    alive: list[float] = []
    done = Progress(alive=lambda: alive.append(time.monotonic()))
    slow = Progress()
    with done.shown(), slow.shown():
        for _ in range(10):
            slow.moved(5)
            time.sleep(0.05)
        grew = len(alive)
        time.sleep(0.3)
    assert (5 <= grew <= 10) if shared else grew == 0
    assert len(alive) - grew <= 1, "nothing has moved since"


def test_what_the_save_is_at_is_said_while_it_is_waited_for(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun, go_on, write = threading.Event(), threading.Event(), saving.write_buffer

    def slow(path: Path, content: torch.Tensor, **options: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        write(path, content, **options)

    monkeypatch.setattr(saving, "write_buffer", slow)
    checkpoints = CheckpointStore(tmp_path, keep=1)
    checkpoints.begin(engine, step=1, extra={})
    assert begun.wait(10)
    assert checkpoints.progress.awaited is None, "training goes on"
    waiting = threading.Thread(target=checkpoints.wait)
    waiting.start()
    while checkpoints.progress.awaited is None:
        time.sleep(0.01)
    told = own_state(0, doing="a save", silent_s=9, calls=None, save=checkpoints.progress.awaited)
    assert not told.waits
    assert "in a save for 9 s, its save writes llm-00000.safetensors" in told.line
    go_on.set()
    waiting.join()
    with checkpoints.progress.shown(awaits_save=True):
        told = own_state(
            0, doing="a save", silent_s=9, calls=None, save=checkpoints.progress.awaited
        )
    assert told.waits and "its save waits for other ranks" in told.line
    assert checkpoints.progress.awaited is None
    checkpoints.close()
