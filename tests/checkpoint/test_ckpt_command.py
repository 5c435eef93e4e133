"""`ghostvis ckpt`: what it lists, finds, writes and deletes."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ghostvis_mega.checkpoint import rewrite
from ghostvis_mega.checkpoint.folder import CheckpointFolder
from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.cli.main import app
from tests.checkpoint.consolidate import consolidate, differing
from tests.checkpoint.tiny import with_moments, write_tiny

pytestmark = pytest.mark.durability


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        write_tiny(checkpoints.directory(step), serial=step, step=step)
    return checkpoints


def ckpt(*args: object) -> Result:
    return CliRunner().invoke(app, ["ckpt", *map(str, args)])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_list_shows_steps_sizes_and_what_is_broken(folder: CheckpointFolder):
    (folder.directory(2) / "llm-00000.safetensors").unlink()
    rows = json.loads(ckpt("list", folder.path, "--json").stdout)
    assert [row["step"] for row in rows] == [1, "", 3]
    assert rows[0]["state"] == "complete" and rows[0]["sequences"] == 8
    assert "llm-00000.safetensors is missing" in rows[1]["state"]
    assert "step-00000003" in ckpt("list", folder.path).stdout
    assert ckpt("list", folder.path / "nothing").exit_code == 2


def test_verify_names_the_file_and_ends_with_1(folder: CheckpointFolder):
    assert ckpt("verify", folder.path).exit_code == 0
    file = folder.directory(2) / "optimizer-00003.safetensors"
    flip(file)
    result = ckpt("verify", folder.path, "--json")
    assert result.exit_code == 1
    assert f"{file} is damaged: its sha256" in result.stderr
    assert [row["ok"] for row in json.loads(result.stdout)] == [True, False, True]
    assert ckpt("verify", folder.directory(1)).exit_code == 0


def test_prune_keeps_what_verifies(folder: CheckpointFolder):
    flip(folder.directory(3) / "llm-00001.safetensors")
    result = ckpt("prune", folder.path, "--keep", 1)
    assert result.exit_code == 0 and "llm-00001.safetensors is damaged" in result.stderr
    assert sorted(p.name for p in folder.path.iterdir()) == ["step-00000002", "step-00000003"]
    flip(folder.directory(2) / "llm-00001.safetensors")
    assert ckpt("prune", folder.path, "--keep", 1).exit_code == 0
    assert folder.directory(2).is_dir()


def test_prune_deletes_what_is_older_unread_as_its_help_says(folder: CheckpointFolder):
    flip(folder.directory(1) / "llm-00001.safetensors")
    assert ckpt("prune", folder.path, "--keep", 1).exit_code == 0
    assert [path.name for path in folder.candidates()] == ["step-00000003"]
    assert "what is older is deleted unread" in ckpt("prune", "--help").stdout


def test_reshard_that_was_killed_or_met_a_full_disk_can_be_repeated(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, out = with_moments(folder.directory(1)), tmp_path / "deep" / "out"
    (tmp_path / "deep" / "out.tmp").mkdir(parents=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "write_later", full)
        result = ckpt("reshard", source, out, "--world", 1)
        assert result.exit_code == 2
        assert f"error: {out} cannot be written: No space left on device" in result.stderr
        assert [path.name for path in out.parent.iterdir()] == ["out.tmp"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as SIGKILL leaves it
        assert ckpt("reshard", source, out, "--world", 1).exit_code == 2
    assert len(list(out.parent.iterdir())) == 2
    assert ckpt("reshard", source, out, "--world", 1).exit_code == 0
    assert ckpt("verify", out).exit_code == 0


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 2), (4, 2, 2), (6, 1, 2), (3, 1, 1)])
def test_reshard_writes_the_same_bits_in_other_files(
    folder: CheckpointFolder, tmp_path: Path, layout: tuple[int, int, int]
):
    world, tensor, pipeline = layout
    source, out = with_moments(folder.directory(1)), tmp_path / "out"
    options = ("--world", world, "--tensor", tensor, "--pipeline", pipeline)
    result = ckpt("reshard", source, out, *options)
    assert result.exit_code == 0, result.output
    assert differing(consolidate(source), consolidate(out)) == []
    manifest = read_manifest(out)
    assert manifest.layout["world_size"] == world and manifest.step == 1
    shared = [info for info in manifest.files.values() if info.kind == "optimizer"]
    assert len(shared) == world // pipeline
    assert ckpt("verify", out).exit_code == 0
    assert "exists already" in ckpt("reshard", source, out, *options).stderr
    back = tmp_path / "back"
    assert ckpt("reshard", out, back, "--world", 2, "--tensor", 2).exit_code == 0
    assert differing(consolidate(source), consolidate(back)) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--world", 3, "--tensor", 2), "3 processes cannot hold replicas of tensor 2"),
        (("--world", 4, "--tensor", 4), "tensor=4 does not divide model.llm.num_kv_heads=2"),
        (("--world", 3, "--pipeline", 3), "2 layers cannot be dealt out over 3 stages"),
    ],
)
def test_reshard_refuses_what_cannot_be_cut(
    folder: CheckpointFolder, tmp_path: Path, options: tuple, says: str
):
    source = with_moments(folder.directory(1))
    result = ckpt("reshard", source, tmp_path / "out", *options)
    assert result.exit_code == 2 and says in result.stderr
    flip(source / "llm-00000.safetensors")
    result = ckpt("reshard", source, tmp_path / "out", "--world", 1)
    assert result.exit_code == 2 and "llm-00000.safetensors is damaged" in result.stderr
    assert not (tmp_path / "out").exists()
