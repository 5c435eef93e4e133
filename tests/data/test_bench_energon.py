"""energon's figures stand beside ours: same pictures, same tar, an interpreter of its own."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.data.encode import Row
from ghostvis_mega.data.ingest import Source, ingest
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import train_tokenizer
from ghostvis_mega.perf import bench_data
from ghostvis_mega.perf.bench_energon import energon_version
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
    rows = list(bench_data._energon(folder, python, "energon 7.4.1"))
    assert [row["value"] for row in rows] == [2 * PICTURES / 0.5, PICTURES / 0.25, MEMBERS / 2.0]
    assert [row["unit"] for row in rows] == ["images/s", "images/s", "members/s"]
    assert all(row["name"].startswith("energon 7.4.1 ") for row in rows)
    assert all(row["bar"] is None and row["ok"] for row in rows)
    assert {path.name for path in folder.iterdir()} == before | {"fake"}


def test_a_worker_that_reads_less_or_fails_gives_no_figures(folder: Path) -> None:
    fewer = program(folder / "fewer", FAKE.format(python=sys.executable, lost=1))
    with pytest.raises(GhostVisError, match="energon read 4 pictures of 5"):
        list(bench_data._energon(folder, fewer, "energon"))
    failing = program(folder / "failing", "#!/bin/sh\necho 'ValueError: no' >&2\nexit 3\n")
    with pytest.raises(GhostVisError, match="ended with 3: ValueError: no"):
        list(bench_data._energon(folder, failing, "energon"))


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
        assert "pip install megatron-energon==" in done.stderr
    asked = program(tmp_path / "asked", "#!/bin/sh\nexit 7\n")
    with pytest.raises(GhostVisError, match="ended with 7"):
        energon_version(asked)
    assert energon_version(program(tmp_path / "has", "#!/bin/sh\necho 7.4.1\n")) == "7.4.1"


def test_the_pip_line_is_a_note_beside_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [bench_data.beside("a", 1.0, "x")]
    given = []

    def measure(folder: Path | None, *, energon: str | None) -> list[dict]:
        given.append(energon)
        return rows

    monkeypatch.setattr(bench_data, "measure_data", measure)
    plain = CliRunner().invoke(app, ["bench", "data", "--json"])
    assert json.loads(plain.stdout) == rows
    assert plain.stderr.count("pip install megatron-energon==") == 1
    named = CliRunner().invoke(app, ["bench", "data", "--json", "--energon", "python3"])
    assert "pip install" not in named.output
    assert given == [None, "python3"]


@pytest.mark.slow
def test_energon_itself_is_measured(folder: Path) -> None:
    python = os.environ.get("GHOSTVIS_ENERGON_PYTHON")
    if python is None:
        pytest.skip(
            "GHOSTVIS_ENERGON_PYTHON is not set: name the python of an environment that has "
            "megatron-energon"
        )
    rows = list(bench_data._energon(folder, python, "energon"))
    assert len(rows) == 3
    assert all(row["value"] > 1 for row in rows)
