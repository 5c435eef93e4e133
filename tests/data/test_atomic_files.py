"""Files are whole or absent."""

import hashlib
import os
from pathlib import Path

import pytest

from ghostvis_mega.utils.files import (
    HashingFile,
    atomic_write,
    atomic_write_json,
    canonical_json,
    sha256_file,
)


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_reaches_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        kind = "directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(f"fsync {kind}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert events == ["fsync file", "replace", "fsync directory"]


def test_canonical_json_depends_on_the_value_alone() -> None:
    assert canonical_json({"b": 1, "a": "\u00e9"}) == canonical_json({"a": "\u00e9", "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_hashing_file_knows_what_it_wrote(tmp_path: Path) -> None:
    file = HashingFile(tmp_path / "x")
    for part in (b"abc", b"", b"d" * 3_000_000):
        file.write(part)
    file.close()
    data = (tmp_path / "x").read_bytes()
    assert file.size_bytes == len(data) == 3_000_003
    assert file.sha256 == hashlib.sha256(data).hexdigest() == sha256_file(tmp_path / "x")
    with pytest.raises(FileExistsError):
        HashingFile(tmp_path / "x")
