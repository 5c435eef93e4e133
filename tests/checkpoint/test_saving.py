"""Saves in the background: nothing overlaps, failures are warnings until the third in a row."""

import errno
import hashlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostvis_mega.checkpoint import saving, store
from ghostvis_mega.checkpoint.reader import CheckpointReader, whole_damage
from ghostvis_mega.checkpoint.snapshot import HostBuffers, Snapshot
from ghostvis_mega.checkpoint.store import CheckpointStore
from ghostvis_mega.checkpoint.tensors import (
    FileImage,
    differs,
    write_buffer,
    write_tensors,
)
from ghostvis_mega.cli.bench_checkpoint import _digest_rows
from ghostvis_mega.utils.errors import CheckpointError, DamagedCheckpointError
from tests.checkpoint.tiny import NAME, write_tiny

pytestmark = pytest.mark.durability


class FakeEngine:
    """Stands for an engine; its weight is `value`."""

    device = torch.device("cpu")
    value = 0.0


def snapshot_of(engine: FakeEngine, buffers: HostBuffers, *, step: int) -> Snapshot:
    """One file with one weight, as `take_snapshot` would give it."""
    weight = torch.full((64, 6), engine.value)
    image = FileImage([(NAME, weight)], metadata={})
    name = "llm-00000.safetensors"
    content = buffers.get(name, image.size_bytes)
    image.copy_to(content)
    entry = {"bytes": image.size_bytes, "kind": "weights", "rank": 0, "tensor_rank": 0}
    parameter = {"dtype": "float32", "module": "llm", "partition_dim": None, "partition_parts": 1}
    return Snapshot(
        rank=0,
        step=step,
        files={name: content},
        entries={name: entry | {"slices": {NAME: [0, 384]}}},
        about={"parameters": {NAME: parameter | {"shape": [64, 6]}}, "optimizer_steps": {}},
        shared={"sequences": step, "layout": {}, "versions": {}},
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(store, "take_snapshot", snapshot_of)
    monkeypatch.setattr(store, "make_buffers", lambda engine: HostBuffers(pinned=False))
    return FakeEngine()


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def names(checkpoints: CheckpointStore) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.path.iterdir())


def test_an_image_is_the_file_that_would_be_written(tmp_path: Path):
    tensors = [("b", torch.randn(3, 2)), ("a", torch.arange(5)), ("c", torch.ones(7).bfloat16())]
    size, digest = write_tensors(tmp_path / "one", tensors, metadata={"k": "v"})
    image = FileImage(tensors, metadata={"k": "v"})
    content = HostBuffers(pinned=False).get("x", image.size_bytes)
    image.copy_to(content)
    assert image.size_bytes == size
    write_buffer(tmp_path / "other", content)
    assert hashlib.sha256(content.numpy()).hexdigest() == digest
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_training_goes_on_and_the_file_has_the_state_of_the_save(
    engine: FakeEngine, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    may_write, write = threading.Event(), saving.write_buffer

    def later(path: Path, content: torch.Tensor, **options: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert may_write.wait(10)
        write(path, content, **options)

    monkeypatch.setattr(saving, "write_buffer", later)
    engine.value = 1.0
    checkpoints.begin(engine, step=1, extra={})
    engine.value = 2.0  # the next step
    assert checkpoints.find("auto") is None
    may_write.set()
    checkpoints.wait()
    with CheckpointReader(checkpoints.find("auto")) as reader:
        assert reader.weight(NAME).unique().tolist() == [1.0]


def test_a_second_save_waits_for_the_first(
    engine: FakeEngine, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    write = saving.write_buffer

    def slow(path: Path, content: torch.Tensor, **options: Any) -> None:
        events.append(f"write {path.parent.name}")
        threading.Event().wait(0.1)
        write(path, content, **options)
        events.append(f"written {path.parent.name}")

    def snapshot(engine: FakeEngine, buffers: HostBuffers, *, step: int) -> Snapshot:
        events.append(f"copy {step}")
        return snapshot_of(engine, buffers, step=step)

    monkeypatch.setattr(saving, "write_buffer", slow)
    monkeypatch.setattr(store, "take_snapshot", snapshot)
    for step in (1, 2, 3):
        checkpoints.begin(engine, step=step, extra={})
    checkpoints.close()
    expected = []
    for step in (1, 2, 3):
        folder = f"step-{step:08d}.tmp"
        expected += [f"copy {step}", f"write {folder}", f"written {folder}"]
    assert events == expected
    assert names(checkpoints) == ["latest", "step-00000002", "step-00000003"]


def test_the_third_failure_in_a_row_stops_and_what_is_there_stays(
    engine: FakeEngine,
    checkpoints: CheckpointStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    checkpoints.save(engine, step=1, extra={})
    sync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # A save that succeeds starts the count anew.
    for step, then in ((2, full), (3, full), (4, sync), (5, full), (6, full), (7, full)):
        monkeypatch.setattr(os, "fsync", then)
        checkpoints.begin(engine, step=step, extra={})
        checkpoints._thread.submit(lambda: None).result()
    assert names(checkpoints) == ["latest", "step-00000001", "step-00000004"]
    with pytest.raises(CheckpointError, match="3 saves in a row .*step 7 .*No space left"):
        checkpoints.begin(engine, step=8, extra={})
    warned = [r.message for r in caplog.records if "Training goes on" in r.message]
    assert [text.split(" could")[0] for text in warned] == [
        f"the checkpoint after step {step}" for step in (2, 3, 5, 6)
    ]
    assert checkpoints.find("auto").name == "step-00000004"


def test_the_last_save_of_a_run_must_succeed(
    engine: FakeEngine, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    def broken(path: Path, content: torch.Tensor, **options: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "write_buffer", broken)
    checkpoints.begin(engine, step=1, extra={})
    with pytest.raises(CheckpointError, match="step 1 could not be saved.*Input/output"):
        checkpoints.close()


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    engine: FakeEngine, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    free = {"bytes": 10**9}
    usage = lambda path: type("Usage", (), {"free": free["bytes"]})  # noqa: E731
    monkeypatch.setattr("ghostvis_mega.checkpoint.folder.shutil.disk_usage", usage)
    path = checkpoints.save(engine, step=1, extra={})
    real = sum(file.stat().st_size for file in path.iterdir())
    predicted = snapshot_of(engine, HostBuffers(pinned=False), step=2).num_bytes
    assert predicted == pytest.approx(real, rel=0.05)
    free["bytes"] = predicted - 1
    with pytest.raises(CheckpointError, match="needs .* GB for it and has .* GB left. Make room"):
        checkpoints.save(engine, step=2, extra={})
    assert names(checkpoints) == ["latest", "step-00000001"]


def test_a_disk_that_gives_back_other_bytes_is_found_at_once(
    engine: FakeEngine, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    forget = saving._forget_cached

    def rot(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        forget(path)

    checkpoints.save(engine, step=1, extra={})
    monkeypatch.setattr(saving, "_forget_cached", rot)
    with pytest.raises(CheckpointError, match="the disk does not give back what was written"):
        checkpoints.save(engine, step=2, extra={})
    assert names(checkpoints) == ["latest", "step-00000001"]


@pytest.mark.parametrize("size", [8, 4099, (32 << 20) + 13])
def test_any_other_byte_on_the_disk_is_seen(tmp_path: Path, size: int):
    content = torch.arange(size, dtype=torch.int32).to(torch.uint8)
    file = tmp_path / "file"
    write_buffer(file, content)
    assert not differs(file, content)
    data = file.read_bytes()
    for at in {0, size // 2, size - 1, 7}:
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert differs(file, content), at
    for other in (data[:-1], data + b"x", b""):
        file.write_bytes(other)
        assert differs(file, content)


@pytest.mark.parametrize("slow", [False, True])
def test_a_save_says_how_long_it_waited_for_digests(
    engine: FakeEngine,
    checkpoints: CheckpointStore,
    monkeypatch: pytest.MonkeyPatch,
    slow: bool,
):
    digest, compare, compared = saving._digest, saving.differs, threading.Event()

    def late(content: torch.Tensor, **options: Any) -> tuple[str, float]:
        if slow:
            assert compared.wait(10)
            time.sleep(0.2)
        return digest(content, **options)

    def differs(path: Path, content: torch.Tensor, **options: Any) -> bool:
        found = compare(path, content, **options)
        compared.set()
        return found

    monkeypatch.setattr(saving, "_digest", late)
    monkeypatch.setattr(saving, "differs", differs)
    path = checkpoints.save(engine, step=1, extra={})
    saved = checkpoints.saved
    assert (path, whole_damage(path)) == (saved.path, [])
    assert saved.seconds > saved.waited_s >= 0
    assert (saved.waited_s > 0.19) == slow
    assert 0 < saved.hashing_s < 0.2


@pytest.mark.parametrize(("waited_s", "ok"), [(0.1, True), (0.5, True), (0.6, False)])
def test_the_wait_for_digests_has_a_bar(tmp_path: Path, waited_s: float, ok: bool):
    saves = [saving.Saved(tmp_path, 5.0, hashing_s=1.0, waited_s=each) for each in (0.0, waited_s)]
    beside, waited = _digest_rows(saves)
    assert (beside["value"], beside["ok"]) == (0.2, None)
    assert (waited["value"], waited["bar"], waited["ok"]) == (waited_s / 10, 0.05, ok)


def test_buffers_are_kept_from_save_to_save():
    buffers = HostBuffers(pinned=False)
    first = buffers.get("a", 1000)
    assert buffers.get("a", 1010).data_ptr() == first.data_ptr()
    assert buffers.get("b", 1000).data_ptr() != first.data_ptr()
    assert buffers.get("a", 3 << 20).numel() == 3 << 20


def test_resume_auto_passes_over_a_damaged_checkpoint_and_retention_does_not_count_it(
    checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folder = checkpoints.folder
    for step in (5, 6):
        write_tiny(folder.directory(step), serial=step, step=step)
    file = folder.directory(6) / "optimizer-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    loaded: list[Path] = []

    def load(path: Path, engine: object) -> Path:
        with CheckpointReader(path) as reader:
            if damage := reader.damage(reader.files()):
                raise store.DamagedCheckpointError("; ".join(damage))
        loaded.append(path)
        return path

    monkeypatch.setattr(checkpoints, "load", load)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.resume("auto", FakeEngine()) == folder.directory(5)
    assert f"{file} is damaged: its sha256" in caplog.text
    assert "Falling back to the checkpoint before it" in caplog.text
    assert folder.prune(1) == []
    with pytest.raises(CheckpointError, match="optimizer-00001"):
        checkpoints.resume(str(folder.directory(6)), FakeEngine())
    assert checkpoints.resume("none", FakeEngine()) is None
    (folder.directory(5) / "llm-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none is complete and sound"):
        checkpoints.resume("auto", FakeEngine())


class FakeDriver:
    """Keeps the list of pinned ranges, as CUDA does."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.pinned.pop(address, None) else 1


@pytest.mark.parametrize("end", ["close", "grow", "forget"])
def test_pinned_memory_is_released_before_it_is_used_again(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    buffers = HostBuffers(pinned=True)
    first = buffers.get("a", 10).data_ptr()
    assert list(driver.pinned) == [first]
    assert buffers.get("a", 20).data_ptr() == first, "the same memory for the next snapshot"
    if end == "close":
        buffers.close()
    elif end == "grow":
        second = buffers.get("a", 9 << 20).data_ptr()
        assert list(driver.pinned) == [second]
        return
    else:
        del buffers  # a store that nobody closed
    assert not driver.pinned


def test_a_run_goes_back_only_to_what_is_its_own(
    engine: FakeEngine, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    folder = checkpoints.folder
    for step in (5, 6):
        checkpoints.save(engine, step=step, extra={})

    def load(self: CheckpointStore, path: Path, engine: FakeEngine) -> Path:
        return path

    monkeypatch.setattr(CheckpointStore, "load", load)
    anew = CheckpointStore(folder.path, keep=9)
    assert anew.resume("none", engine) is None
    assert anew.go_back(engine) is None
    other = CheckpointStore(folder.path, keep=9)
    other.resume(str(folder.directory(5)), engine)
    assert other.go_back(engine) == folder.directory(5)
    other.save(engine, step=3, extra={})
    assert other.go_back(engine) == folder.directory(3)
    # What it saved and what it began with turn out damaged: there is nothing left.
    other.folder.damaged.add("step-00000003")
    (folder.directory(5) / "manifest.json").unlink()
    assert other.go_back(engine) is None
    other.close()
    anew.close()


def test_going_back_passes_over_damage(
    engine: FakeEngine, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    for step in (5, 6):
        checkpoints.save(engine, step=step, extra={})
    bad: set[str] = set()

    def load(self: CheckpointStore, path: Path, engine: FakeEngine) -> Path:
        if path.name in bad:
            raise DamagedCheckpointError(path.name)
        return path

    monkeypatch.setattr(CheckpointStore, "load", load)
    checkpoints.resume("auto", engine)
    checkpoints.save(engine, step=7, extra={})
    bad.add("step-00000007")
    assert checkpoints.go_back(engine) == checkpoints.folder.directory(6)
    bad.add("step-00000006")
    assert checkpoints.go_back(engine) is None
