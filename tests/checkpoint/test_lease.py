"""Two launches in one run folder: the later one has it, the earlier one stops and harms nothing."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostvis_mega.checkpoint import saving, store
from ghostvis_mega.checkpoint.lease import LEASE_FILE, Lease
from ghostvis_mega.checkpoint.snapshot import HostBuffers
from ghostvis_mega.checkpoint.store import CheckpointStore
from ghostvis_mega.checkpoint.together import on_first_rank
from ghostvis_mega.utils.errors import CheckpointError, FolderTakenError
from tests.checkpoint.test_saving import FakeEngine, snapshot_of

pytestmark = pytest.mark.durability

BOTH = "run now belongs to launch later on .* started later than this one, launch earlier on "


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(store, "take_snapshot", snapshot_of)
    monkeypatch.setattr(store, "make_buffers", lambda engine: HostBuffers(pinned=False))
    return FakeEngine()


def launch(run: Path, name: str) -> CheckpointStore:
    """A launch that has just started."""
    lease = Lease(run, launch=name)
    on_first_rank(lease.take)
    return CheckpointStore(run / "checkpoints", keep=9, lease=lease)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def half_written(run: Path, step: int) -> Path:
    """What the later launch is writing."""
    path = run / "checkpoints" / f"step-{step:08d}.tmp"
    path.mkdir(parents=True)
    (path / "llm-00000.safetensors").write_bytes(b"half")
    return path


def test_what_a_dead_launch_left_keeps_nobody_from_starting(engine: FakeEngine, tmp_path: Path):
    for step, name in enumerate(("a", "b", "c")):
        with_it = launch(tmp_path / "run", name)
        with_it.save(engine, step=step, extra={})
        with_it.close()
        assert json.loads((tmp_path / "run" / LEASE_FILE).read_text())["launch"] == name
    assert len(names(tmp_path / "run")) == 3


@pytest.mark.parametrize("checked", [True, False])
def test_the_earlier_launch_stops_at_its_next_save(
    engine: FakeEngine, tmp_path: Path, checked: bool
):
    run = tmp_path / "run"
    earlier = launch(run, "earlier")
    earlier.begin(engine, step=1, extra={})
    earlier.wait()
    launch(run, "later")
    half_written(run, 2)
    if not checked:  # the control: it does remove what the other one writes
        earlier.lease = None
        earlier.begin(engine, step=2, extra={})
        earlier.close()
        assert names(run) == ["step-00000001", "step-00000002"]
        return
    with pytest.raises(FolderTakenError, match=BOTH):
        earlier.begin(engine, step=2, extra={})
    assert names(run) == ["step-00000001", "step-00000002.tmp"]
    with pytest.raises(FolderTakenError, match=BOTH):
        earlier.save(engine, step=2, extra={})
    assert names(run) == ["step-00000001", "step-00000002.tmp"]
    earlier.close()


@pytest.mark.parametrize("removed", [False, True])
def test_a_folder_that_is_taken_while_a_save_is_written(
    engine: FakeEngine, tmp_path: Path, removed: bool, monkeypatch: pytest.MonkeyPatch
):
    run, write = tmp_path / "run", saving.write_buffer
    begun, go_on = threading.Event(), threading.Event()

    def slow(path: Path, content: torch.Tensor, **options: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        write(path, content, **options)

    monkeypatch.setattr(saving, "write_buffer", slow)
    earlier = launch(run, "earlier")
    earlier.begin(engine, step=3, extra={})
    assert begun.wait(10)
    later = launch(run, "later")
    if removed:  # as the later one's first save does
        later.folder.discard(3)
        half_written(run, 4)
    go_on.set()
    with pytest.raises(FolderTakenError, match=BOTH):
        # Not counted among failed saves, after which a run may go on.
        earlier.begin(engine, step=4, extra={})
    assert names(run) == ["step-00000004.tmp" if removed else "step-00000003.tmp"]
    assert later.find("auto") is None
    earlier.close()
    later.save(engine, step=3, extra={})
    assert names(run) == ["step-00000003"]


def test_a_file_that_is_gone_or_damaged(
    engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = tmp_path / "run"
    one = launch(run, "earlier")
    (run / LEASE_FILE).unlink()
    one.save(engine, step=1, extra={})
    (run / LEASE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="launch.json cannot be read"):
        one.save(engine, step=2, extra={})
    assert names(run) == ["step-00000001"]
    # In the background as well: a file server may answer so once.
    for step in (3, 4):
        one.begin(engine, step=step, extra={})
    assert "step 3 could not be saved: " in caplog.text and "Training goes on" in caplog.text
    (run / LEASE_FILE).unlink()
    one.begin(engine, step=5, extra={})
    one.wait()
    assert names(run) == ["step-00000001", "step-00000005"]
    (run / LEASE_FILE).write_text("{")
    for step in (6, 7, 8):
        one.begin(engine, step=step, extra={})
    with pytest.raises(CheckpointError, match="3 saves in a row .*step 8 .*cannot be read"):
        one.begin(engine, step=9, extra={})
    one.close()
    last = launch(run, "earlier")
    (run / LEASE_FILE).write_text("{")
    last.begin(engine, step=9, extra={})
    with pytest.raises(CheckpointError, match="step 9 could not be saved: .*cannot be read"):
        last.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: .*Make room or name another"):
        launch(tmp_path / "file" / "run", "later")
