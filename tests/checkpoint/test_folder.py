"""Which checkpoint is the newest, what interrupted saves leave, and what retention deletes."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from ghostvis_mega.checkpoint.folder import CheckpointFolder
from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.checkpoint.store import CheckpointStore
from ghostvis_mega.utils.errors import CheckpointError
from tests.checkpoint.tiny import write_tiny

pytestmark = pytest.mark.durability


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def save(folder: CheckpointFolder, step: int) -> Path:
    """As `CheckpointStore.save` does it, with a checkpoint written by hand."""
    serial = folder.next_serial()
    temporary = folder.begin(step)
    temporary.rmdir()
    write_tiny(temporary, serial=serial, step=step)
    return folder.publish(step)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


def test_an_empty_folder_has_none(folder: CheckpointFolder):
    assert folder.newest() is None
    assert CheckpointStore(folder.path, keep=1).find("auto") is None


def test_the_newest_is_found_and_latest_names_it(folder: CheckpointFolder):
    paths = [save(folder, step) for step in (5, 10)]
    assert folder.newest() == paths[1] == folder.path / "step-00000010"
    assert (folder.path / "latest").read_text() == "step-00000010\n"


@pytest.mark.parametrize("value", ["NaN", "1e999", '{"a": "\\ud800"}'])
def test_a_manifest_that_nobody_can_have_written_is_damage(folder: CheckpointFolder, value: str):
    sound, other = save(folder, 5), save(folder, 10)
    manifest = other / "manifest.json"
    text = manifest.read_text().replace('"extra": {}', f'"extra": {value}')
    assert value in text
    manifest.write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json is damaged: it is not valid JSON"):
        read_manifest(other)
    assert folder.newest() == sound
    assert folder.next_serial() == 2
    assert folder.prune(1) == []


def test_after_a_step_back_the_last_save_is_the_newest(folder: CheckpointFolder):
    for step in (5, 10, 7):
        save(folder, step)
    assert folder.newest() == folder.directory(7)
    assert [path.name for path in folder.prune(1)] == ["step-00000005", "step-00000010"]
    again = save(folder, 7)
    assert folder.newest() == again
    assert names(folder) == ["latest", "step-00000007"]


def test_retention_keeps_the_newest(folder: CheckpointFolder):
    for step in (1, 2, 3, 4):
        save(folder, step)
        folder.prune(2)
    assert names(folder) == ["latest", "step-00000003", "step-00000004"]


def test_a_damaged_checkpoint_does_not_count_as_kept(folder: CheckpointFolder):
    for step in (1, 2, 3):
        save(folder, step)
    (folder.directory(3) / "manifest.json").unlink()
    assert folder.prune(2) == []
    assert folder.newest() == folder.directory(2)


def test_what_interrupted_saves_left_is_ignored_and_removed(folder: CheckpointFolder):
    done = save(folder, 5)
    shutil.copytree(done, folder.temporary(6))
    shutil.copytree(done, folder.path / "step-00000004.replaced.tmp")
    (folder.path / "step-00000008.tmp").mkdir()
    (folder.path / "notes.tmp").mkdir()
    assert folder.newest() == done
    folder.begin(7)
    assert names(folder) == ["latest", "notes.tmp", "step-00000005", "step-00000007.tmp"]


def test_a_save_that_stops_while_it_replaces_loses_nothing(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
):
    save(folder, 7)
    rename = os.replace

    def stop(source: Path, target: Path) -> None:
        if source == folder.temporary(7):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        save(folder, 7)
    assert folder.newest() == folder.path / "step-00000007.replaced"
    assert save(folder, 7) == folder.newest()
    assert names(folder) == ["latest", "step-00000007"]


def test_the_last_step_is_of_whole_ones(folder: CheckpointFolder):
    assert folder.last_step() == 0
    save(folder, 5)
    temporary = folder.begin(9)
    temporary.rmdir()
    write_tiny(temporary, serial=2, step=9)
    assert folder.last_step() == 5
    folder.publish(9)
    assert folder.last_step() == 9


def test_an_incomplete_one_is_passed_over_with_a_warning(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
):
    older, newer = save(folder, 5), save(folder, 6)
    file = newer / "llm-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert folder.newest() == older
    assert str(file) in caplog.text


def test_what_is_saved_over_a_damaged_one_counts_again(folder: CheckpointFolder):
    for step in (5, 6):
        save(folder, step)
    folder.damaged.add("step-00000006")
    assert folder.newest() == folder.directory(5)
    again = save(folder, 6)
    assert folder.newest() == again
    assert folder.damaged == set()


def test_a_damaged_one_that_is_being_replaced_does_not_count(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
):
    older, _ = save(folder, 5), save(folder, 6)
    folder.damaged.add("step-00000006")
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source == folder.temporary(6):
            raise OSError("no")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "replace", refuse)
        save(folder, 6)
    assert (folder.path / "step-00000006.replaced").is_dir()
    assert folder.newest() == older


@pytest.mark.parametrize("how", ["digest", "size"])
def test_what_a_run_fell_back_from_never_becomes_the_newest_again(
    folder: CheckpointFolder, how: str
):
    save(folder, 5)
    left = save(folder, 10)
    file = left / "llm-00001.safetensors"
    content = file.read_bytes()
    if how == "size":
        file.write_bytes(content[:-1])
    else:
        folder.damaged.add(left.name)
    next_one = save(folder, 7)
    file.write_bytes(content)
    # A new process knows of no damage.
    assert CheckpointFolder(folder.path).newest() == next_one


def test_a_folder_of_broken_checkpoints_is_no_fresh_start(folder: CheckpointFolder):
    (save(folder, 5) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none is complete.*checkpoint.resume=none"):
        folder.newest()


def test_none_starts_anew_and_a_path_is_taken(folder: CheckpointFolder):
    store = CheckpointStore(folder.path, keep=1)
    path = save(folder, 5)
    save(folder, 6)
    assert store.find("none") is None
    assert store.find(str(path)) == path


def test_a_named_checkpoint_that_is_missing_or_broken_is_refused(folder: CheckpointFolder):
    store = CheckpointStore(folder.path, keep=1)
    path = save(folder, 5)
    absent = folder.directory(6)
    with pytest.raises(CheckpointError, match=f"resume={absent}: {absent} is not a directory"):
        store.find(str(absent))
    with pytest.raises(CheckpointError, match=f"name one: {path}"):
        store.find(str(folder.path))
    (path / "optimizer-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="optimizer-00001.safetensors is missing"):
        store.find(str(path))
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="holds no manifest.json"):
        store.find(str(path))
