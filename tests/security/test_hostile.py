"""Files made to do harm are refused at every door; readers that are not careful are caught."""

import importlib
import io
import tarfile
import time
from pathlib import Path

import pytest

from ghostvis_mega.cli.hostile.case import Case, Kit, put
from ghostvis_mega.cli.hostile.doors import Doors
from ghostvis_mega.cli.hostile.drill import CASES, Result, make_kit, run_case, run_drill
from ghostvis_mega.cli.hostile.trial import Limits
from ghostvis_mega.utils.errors import DataError

pytestmark = pytest.mark.durability


def test_every_file_is_refused(tmp_path: Path) -> None:
    results = list(run_drill(tmp_path))
    assert {r.case.name: r.problem for r in results if r.problem is not None} == {}
    assert len(results) == len(CASES) > 150
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_door_has_visitors() -> None:
    doors = {name for name in vars(Doors) if not name.startswith("_")}
    assert {case.door for case in CASES} == doors - {"tokenizer", "images", "out"}


class Careless:
    """What each rule is there for."""

    def loads_pickles(self, path: Path) -> None:
        importlib.import_module("pickle").loads(path.read_bytes())

    def extracts(self, path: Path) -> None:
        with tarfile.open(path) as tar:
            for member in tar:
                source = tar.extractfile(member)
                assert source is not None
                (path.parent / member.name).write_bytes(source.read())
        raise DataError("refused too late")

    def fetches(self, path: Path) -> None:
        import socket

        with socket.socket() as connection:
            connection.settimeout(0.1)
            connection.connect_ex(("127.0.0.1", 9))
        raise DataError("refused too late")

    def accepts(self, path: Path) -> None:
        path.read_bytes()

    def crashes(self, path: Path) -> None:
        raise KeyError("header")

    def takes_memory(self, path: Path) -> None:
        data = bytearray(b"\1") * (300 << 20)
        raise DataError(f"refused with {len(data)} bytes")

    def takes_time(self, path: Path) -> None:
        end = time.process_time() + 2.2
        while time.process_time() < end:
            pass
        raise DataError("refused at last")

    def hangs(self, path: Path) -> None:
        time.sleep(60)

    def says_nothing(self, path: Path) -> None:
        raise DataError("")

    def refuses(self, path: Path) -> None:
        raise DataError(f"{path} is not what it says")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


def visit(door: str, kit: Kit, folder: Path, *, content: bytes | None = None) -> Result:
    case = Case("planted", door, lambda kit, own: put(own / "file", content or kit.pickle))
    (folder / "out").mkdir()
    own = folder / "000"
    own.mkdir()
    return run_case(case, kit, own, doors=Careless(), limits=Limits())


@pytest.mark.parametrize(
    ("door", "told"),
    [
        ("loads_pickles", "a command inside of the file was run"),
        ("fetches", "it did what no reader does: socket.connect"),
        ("accepts", "accepted"),
        ("crashes", "crashed: KeyError: 'header'"),
        ("takes_memory", "MiB of memory"),
        ("takes_time", "s of CPU time"),
        ("says_nothing", "refused without a sentence"),
    ],
)
def test_a_careless_reader_is_caught(kit: Kit, tmp_path: Path, door: str, told: str) -> None:
    problem = visit(door, kit, tmp_path).problem
    assert problem is not None and told in problem


def test_a_reader_that_hangs_is_ended(kit: Kit, tmp_path: Path) -> None:
    case = Case("planted", "hangs", lambda kit, own: put(own / "file", b""))
    own = tmp_path / "000"
    own.mkdir()
    result = run_case(case, kit, own, doors=Careless(), limits=Limits(wall_s=0.5))
    assert result.problem is not None and result.problem.startswith("hung")


def test_a_file_written_elsewhere_is_seen(kit: Kit, tmp_path: Path) -> None:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("../escape"))
        content = file.getvalue()
    result = visit("extracts", kit, tmp_path, content=content)
    assert (tmp_path / "escape").exists()
    assert result.problem is not None and "escape" in result.problem
    assert any("open for writing" in event for event in result.outcome.events)


def test_a_careful_reader_passes(kit: Kit, tmp_path: Path) -> None:
    result = visit("refuses", kit, tmp_path)
    assert result.problem is None
    assert result.outcome.cpu_s < 0.5 and result.outcome.memory_mib < 64
