"""The header walk finds what `tarfile` finds, and refuses what is damaged."""

import io
import tarfile
from pathlib import Path

import pytest

from ghostvis_mega.data.tars import tar_members
from ghostvis_mega.utils.errors import DataError


def _write(path: Path, form: int, names: list[str]) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]


NAMES = ["a.jpg", "a.json", "folder/0001.jpg", "d" * 90 + "/" + "n" * 60]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_of_tarfile(tmp_path: Path, form: int) -> None:
    names = NAMES if form == tarfile.USTAR_FORMAT else NAMES[:3]
    expected = _write(tmp_path / "a.tar", form, names)
    assert len(expected) == len(names)
    assert [tuple(member) for member in tar_members(tmp_path / "a.tar")] == expected


def test_damage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    expected = _write(file, tarfile.USTAR_FORMAT, NAMES)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[expected[1][1] - 512 + 3] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(DataError, match=r"no tar header at byte \d+"):
        list(tar_members(file))
    file.write_bytes(whole[: expected[3][1] + 100])
    with pytest.raises(DataError, match="ends inside of the member"):
        list(tar_members(file))
    file.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        list(tar_members(file))
    _write(file, tarfile.GNU_FORMAT, ["n" * 150])
    with pytest.raises(DataError, match="record of kind 'L'"):
        list(tar_members(file))
