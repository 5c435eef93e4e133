"""Folders that a bench of the disk refuses, and why."""

import subprocess
import sys
from pathlib import Path

import pytest

from ghostvis_mega.utils import disks
from ghostvis_mega.utils.disks import disk_problem, kind_of_filesystem
from tests.launch import ROOT

SHM = Path("/dev/shm")
MOUNTS = """\
22 1 {number} / {folder} rw,relatime shared:1 - {kind} /dev/vda rw
23 1 0:99999 / /elsewhere rw - proc proc rw
"""


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm")
def test_shared_memory_is_no_disk() -> None:
    assert kind_of_filesystem(SHM / "not" / "there") == "tmpfs"
    problem = disk_problem(SHM / "new", num_bytes=3_000_000_000, option="--out")
    assert problem is not None
    assert problem.startswith("/dev/shm lies in memory (tmpfs): ")
    assert "takes 3.000 GB of the memory. Name a folder on a disk with --out." in problem


@pytest.mark.parametrize(("kind", "refused"), [("tmpfs", True), ("ramfs", True), ("xfs", False)])
def test_the_kind_is_that_of_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refused: bool
) -> None:
    device = tmp_path.stat().st_dev
    number = f"{device >> 8 & 0xFFF}:{device & 0xFF | device >> 12 & 0xFFF00}"
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS.format(number=number, folder=tmp_path, kind=kind))
    monkeypatch.setattr(disks, "_MOUNTS", table)
    assert kind_of_filesystem(tmp_path) == kind
    assert (disk_problem(tmp_path, num_bytes=10, option="--out") is not None) == refused
    table.write_text("")
    assert kind_of_filesystem(tmp_path) == ""


def test_a_disk_that_is_too_small_is_told_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "kind_of_filesystem", lambda path: "ext4")
    problem = disk_problem(tmp_path / "new", num_bytes=10**18, option="--out")
    assert problem is not None and problem.startswith(f"{tmp_path} has ")
    assert "1000000000.000 GB are needed" in problem
    assert disk_problem(tmp_path, num_bytes=1000, option="--out") is None
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm")
def test_bench_checkpoint_refuses_before_it_builds_anything(easy_vqa: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{preset: vlm_tiny}}\ndata: {{train: {easy_vqa}/train.gvd, seq_length: 128}}\n"
        f"batch: {{global_size: 2}}\ndeepspeed: {{llm: {ROOT}/ds_configs/zero1.json}}\n"
        f"train: {{steps: 3, device: cpu}}\nlog: {{output: {tmp_path}/run}}\n"
    )
    place = SHM / tmp_path.name
    code = (
        "import sys; sys.argv[0] = 'ghostvis'; from ghostvis_mega.cli.main import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "checkpoint", str(run), "--out", str(place)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: /dev/shm lies in memory (tmpfs)")
    assert not place.exists()
