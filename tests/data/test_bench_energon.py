"""energon's figures stand beside ours: same pictures, same tar, an interpreter of its own."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.data.encode import Row
from ghostvis_mega.data.ingest import Source, ingest
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import train_tokenizer
from ghostvis_mega.perf import bench_data, bench_energon
from ghostvis_mega.perf.bench_energon import Energon, energon_version, find_energon
from ghostvis_mega.perf.energon_install import install_energon, installed_energon
from ghostvis_mega.perf.synthetic_data import write_synthetic
from ghostvis_mega.utils.errors import GhostVisError

PICTURES, MEMBERS = 5, 30
FAKE = """#!{python}
import json, sys, tarfile
from pathlib import Path

if sys.argv[1] == "-c":
    print("7.4.1")
    sys.exit()
worker, export, tars, side, batch, workers = sys.argv[1:]
assert (Path(worker).name, side, batch, workers) == ("energon_worker.py", "336", "16", "2")
shards = json.loads((Path(export) / "export.json").read_text())["shards"]
pictures = sum(
    name.endswith(".jpg")
    for shard in shards
    for name in tarfile.open(Path(export) / shard).getnames()
)
members = sum(len(tarfile.open(path).getnames()) for path in Path(tars).iterdir())
print("energon says something first")
print(json.dumps({{
    "one_process": {{"images": pictures, "cpu_s": 0.5, "wall_s": 9.0}},
    "workers": {{"images": pictures - {lost}, "cpu_s": 9.0, "wall_s": 0.25}},
    "prepare": {{"samples": members, "cpu_s": 2.0}},
}}))
"""


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the bench has written when energon's turn comes, smaller."""
    words = ["what is in the picture?", "a photo of a street."]
    tokenizer = train_tokenizer(words, vocab_size=280, path=tmp_path / "words.model")
    rows = []
    for number in range(PICTURES):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(bench_data.photo(number))
        turns = (Turn("user", (ImagePart(), words[0])), Turn("assistant", (words[1],)))
        rows.append(Row(f"{number}", turns, (file,), ()))
    ingest([Source("photos", rows)], tokenizer=tokenizer, path=tmp_path / "in.gvd", workers=1)
    write_synthetic(
        tmp_path / "many.gvd",
        text_lengths=np.full(4, 16),
        image_of=np.full(4, -1),
        pictures=[(b"%d" % number, 4, 4) for number in range(MEMBERS)],
    )
    return tmp_path


def test_rows_come_from_the_worker_and_have_no_bar(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    python = program(folder / "fake", FAKE.format(python=sys.executable, lost=0))
    rows = list(bench_data._energon(folder, Energon(python, "7.4.1")))
    assert [row["value"] for row in rows] == [2 * PICTURES / 0.5, PICTURES / 0.25, MEMBERS / 2.0]
    assert [row["unit"] for row in rows] == ["images/s", "images/s", "members/s"]
    assert all(row["name"].startswith("energon 7.4.1 ") for row in rows)
    assert all(row["bar"] is None and row["ok"] for row in rows)
    assert {path.name for path in folder.iterdir()} == before | {"fake"}


def test_a_worker_that_reads_less_or_fails_gives_no_figures(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fewer = program(folder / "fewer", FAKE.format(python=sys.executable, lost=1))
    failing = program(folder / "failing", "#!/bin/sh\necho 'ValueError: no' >&2\nexit 3\n")
    for python, problem in (
        (fewer, "energon read 4 pictures of 5"),
        (failing, "ended with 3: ValueError: no"),
    ):
        rows = list(bench_data._energon(folder, Energon(python, "7.4.1")))
        assert len(rows) == 3
        assert all(row["value"] is None and not row["ok"] for row in rows)
        assert problem in caplog.text


def test_an_interpreter_without_energon_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = program(
        tmp_path / "without",
        "#!/bin/sh\necho 'importlib.metadata.PackageNotFoundError: megatron-energon' >&2\nexit 1\n",
    )
    monkeypatch.setattr(bench_data, "_plans", lambda: pytest.fail("timed"))
    for python, problem in (
        (without, "has no megatron-energon"),
        (str(tmp_path / "nowhere"), "there is no such program"),
    ):
        done = CliRunner().invoke(app, ["bench", "data", "--energon", python])
        assert done.exit_code == 2
        assert problem in done.stderr
        assert "without --energon, megatron-energon==" in done.stderr
    asked = program(tmp_path / "asked", "#!/bin/sh\nexit 7\n")
    with pytest.raises(GhostVisError, match="ended with 7"):
        energon_version(asked)
    assert energon_version(program(tmp_path / "has", "#!/bin/sh\necho 7.4.1\n")) == "7.4.1"


# Stands for the Python of the bench: makes environments, whose Python has a pip that notes what it
# is asked for.
MAKER = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 9
mkdir -p "$3/bin" "$3/lib/python{version}/site-packages"
cp "{inside}" "$3/bin/python"
"""
INSIDE = """#!/bin/sh
if [ "$1" = "-c" ]; then echo 7.4.1; exit; fi
echo "$PYTHONPATH$@" >> "{log}"
{then}
"""


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A base Python whose environments' pip ends with the given shell line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "/of/the/caller")

    def _maker(then: str) -> str:
        inside = program(tmp_path / "inside", INSIDE.format(log=tmp_path / "log", then=then))
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return program(tmp_path / "base", MAKER.format(version=version, inside=inside))

    return _maker


def test_energon_is_installed_once_beside_the_packages_at_hand(
    tmp_path: Path, maker: Callable[[str], str]
) -> None:
    base = maker("exit 0")
    assert installed_energon() is None
    python = Path(install_energon(base=base))
    assert installed_energon() == str(python)
    assert install_energon(base=base) == str(python)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["-m pip install --quiet --no-input megatron-energon==7.4.1"]
    (place,) = (tmp_path / "cache" / "ghostvis").iterdir()
    assert python == place / "bin" / "python"
    (paths,) = place.glob("lib/*/site-packages/*.pth")
    assert str(Path(pytest.__file__).resolve().parents[1]) in paths.read_text().splitlines()
    python.unlink()  # as after the Python that it links to was removed
    assert install_energon(base=base) == str(python)
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_failed_installation_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, maker: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = maker("echo 'WARNING: x' >&2; echo 'ERROR: No matching distribution' >&2; exit 1")
    with pytest.raises(GhostVisError) as caught:
        install_energon(base=base)
    sentence = str(caught.value)
    assert sentence.startswith(
        "megatron-energon==7.4.1 could not be installed (ERROR: No matching distribution): "
    )
    assert "--no-energon" in sentence
    assert "\n" not in sentence
    assert list((tmp_path / "cache" / "ghostvis").iterdir()) == []
    with pytest.raises(GhostVisError, match=r"could not be installed \(no output\)"):
        install_energon(base=program(tmp_path / "none", "#!/bin/sh\nexit 1\n"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GhostVisError, match="could not be installed .*file"):
        install_energon(base=base)


def test_without_energon_our_rows_stand_and_the_command_ends_with_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> str:
        raise GhostVisError("it could not be installed")

    ours = [bench_data.at_least("a", 5.0, "x", 5)]
    monkeypatch.setattr(bench_energon, "install_energon", refuse)
    for name in ("_plans", "_million", "_loader", "_ingest"):
        monkeypatch.setattr(bench_data, name, lambda *_: ours)
    monkeypatch.setattr(bench_data, "photo", lambda _: b"")
    assert find_energon() == Energon(None, "7.4.1", "it could not be installed")
    done = CliRunner().invoke(app, ["bench", "data", "--json"])
    rows = json.loads(done.stdout)
    assert done.exit_code == 1
    assert rows[:4] == 4 * ours
    assert [(row["value"], row["ok"]) for row in rows[4:]] == 3 * [(None, False)]
    table = CliRunner().invoke(app, ["bench", "data"])
    assert table.stdout.count("not measured") == 3
    without = CliRunner().invoke(app, ["bench", "data", "--json", "--no-energon"])
    assert (without.exit_code, json.loads(without.stdout)) == (0, 4 * ours)
    both = CliRunner().invoke(app, ["bench", "data", "--no-energon", "--energon", "python3"])
    assert both.exit_code == 2


@pytest.mark.slow
def test_energon_itself_is_measured(folder: Path) -> None:
    python = os.environ.get("GHOSTVIS_ENERGON_PYTHON") or installed_energon()
    if python is None:
        pytest.skip(
            "no megatron-energon: run `python -m ghostvis_mega bench data` once, or set "
            "GHOSTVIS_ENERGON_PYTHON to a python that has it"
        )
    rows = list(bench_data._energon(folder, find_energon(python)))
    assert len(rows) == 3
    assert all(row["value"] > 1 for row in rows)
