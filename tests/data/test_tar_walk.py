"""The walk over a tar's headers finds what `tarfile` finds, and says where a tar is damaged."""

import io
import tarfile
from pathlib import Path

import pytest

from ghostvis_mega.data.readers.tars import BadMember, walk_tar


def _write(path: Path, form: int, names: list[str]) -> list[tuple[str, int, bytes]]:
    """Name, place and bytes of each regular file as `tarfile` reads them."""
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            data = bytes([65 + number]) * (number * 300)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        files = [member for member in tar.getmembers() if member.isreg()]
        return [(m.name, m.offset_data, tar.extractfile(m).read()) for m in files]


NAMES = ["a.jpg", "a.json", "folder/0001.jpg", "d" * 90 + "/" + "n" * 60]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_of_tarfile(tmp_path: Path, form: int) -> None:
    # GNU and PAX write a record of its own for a name that fits no header.
    names = [*NAMES, "n" * 150] if form != tarfile.USTAR_FORMAT else NAMES
    expected = [(name, data) for name, _, data in _write(tmp_path / "a.tar", form, names)]
    assert len(expected) == len(names)
    found = list(walk_tar(tmp_path / "a.tar"))
    assert [(member.name, member.data) for member in found] == expected


def test_damage_ends_the_walk_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    expected = _write(file, tarfile.USTAR_FORMAT, NAMES)
    whole = file.read_bytes()

    def end_of(data: bytes) -> BadMember:
        file.write_bytes(data)
        *good, last = walk_tar(file)
        assert isinstance(last, BadMember) and last.fatal
        assert [m.name for m in good] == [name for name, _, _ in expected][: len(good)]
        return last

    at = expected[1][1] - 512
    flipped = bytearray(whole)
    flipped[at + 3] ^= 1
    found = end_of(bytes(flipped))
    assert (found.reason, found.detail) == ("broken_tar", f"no tar header at byte {at}")
    found = end_of(whole[: expected[3][1] + 100])
    assert found.reason == "truncated_tar" and found.name == NAMES[3]
    assert end_of(b"").reason == "truncated_tar"
