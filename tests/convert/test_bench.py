"""The conversion benchmark on a model that is small enough for a test."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.convert import bench
from ghostvis_mega.convert.mapping import Parts
from tests.convert.sharded import MODELS


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(bench.MODELS, "small", MODELS["untied"])


@pytest.mark.slow
def test_rows_and_exit_code(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench, "SHARE_OF_COPY", 0.0)
    arguments = ["bench", "convert", "--folder", str(tmp_path), "--json", "--model"]
    # What this process holds is not counted.
    held = bytearray(b"x") * 2_100_000_000
    result = CliRunner().invoke(app, [*arguments, "small", "--rounds", "1"])
    del held
    assert result.exit_code == 0, result.output
    rows = {row["name"].removeprefix("small: "): row for row in json.loads(result.stdout)}
    assert rows["different after the way there and back"]["value"] == 0
    assert rows["tensors"]["value"] == 92
    for step in ("import", "export"):
        assert 0.1 < rows[f"{step}, memory"]["value"] < bench.LARGEST_MEMORY_GB
        assert rows[f"{step} / copy"]["value"] > 0
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(app, [*arguments, "huge"]).exit_code == 2


def in_this_process(what: str, source: Path, out: Path) -> bench.Timed:
    """In the place of `_timed`."""
    bench._step(what, source, out)
    memory = 0.1 if "copy" in what else 3.0
    return bench.Timed(seconds=1.0, cpu_seconds=1.0, memory_gb=memory)


def test_a_changed_bit_and_a_missed_bar_are_told(tmp_path: Path, monkeypatch):
    right = bench._digests

    def flipped(folder: Path):
        path = next(folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return right(folder)

    monkeypatch.setattr(bench, "_timed", in_this_process)
    rows = bench.bench_model("small", tmp_path, rounds=1, progress=lambda _: None)
    missed = [row["name"] for row in rows if row["ok"] is False]
    assert missed == ["small: import, memory", "small: export, memory"]
    monkeypatch.setattr(bench, "_digests", flipped)
    monkeypatch.setattr(bench, "SHARE_OF_COPY", 1.1)
    rows = bench.bench_model("small", tmp_path, rounds=1, progress=lambda _: None)
    assert [row["name"] for row in rows if row["ok"] is False] == [
        "small: different after the way there and back",
        "small: import / copy",
        "small: import, memory",
        "small: export / copy",
        "small: export, memory",
    ]


def test_random_tensors_differ_from_each_other(tmp_path: Path):
    parts = Parts.of(ModelConfig.model_validate(MODELS["untied"]))
    digests, _ = bench.make_random(tmp_path / "model", parts)
    assert len(set(digests.values())) == len(digests) == 92
    assert dict(bench._digests(tmp_path / "model")) == digests
