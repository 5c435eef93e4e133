"""The bench's rows say what was measured and whether it is enough."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.data.pixels import probe
from ghostvis_mega.perf import bench_data
from ghostvis_mega.perf.bench_plan import plan_once
from ghostvis_mega.utils.figures import at_least, at_most, measured

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_is_measured_with_its_fill() -> None:
    found = plan_once(50_000)
    assert 0.98 <= found["fill"] <= 1
    assert found["cpu_s"] > 0
    assert 0.01 < found["peak_gb"] < 20


def test_photos_are_of_the_size_they_say_and_differ() -> None:
    info = probe(bench_data.photo(0))
    assert (info.width, info.height) == (640, 480)
    assert bench_data.photo(0) != bench_data.photo(1)
    assert 30_000 < len(bench_data.photo(0)) < 200_000


def test_a_missed_bar_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [at_least("a", 5.0, "x", 5), measured("b", 1.0, "x")]
    bad = [*good, at_most("c", 6.0, "s", 5)]
    for rows, code in ((good, 0), (bad, 1)):
        monkeypatch.setattr(bench_data, "measure_data", lambda folder, energon, rows=rows: rows)
        done = CliRunner().invoke(app, ["bench", "data", "--json", "--no-energon"])
        assert done.exit_code == code
        assert json.loads(done.stdout) == rows
    assert CliRunner().invoke(app, ["bench", "data", "--folder", "/nowhere"]).exit_code == 2


@pytest.mark.slow
def test_the_command_reaches_its_bars(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ghostvis_mega", "bench", "data", "--json", "--no-energon",
         "--folder", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    rows = json.loads(done.stdout[done.stdout.index("[{") :])
    assert [row for row in rows if not row["ok"]] == [], done.stderr
    assert done.returncode == 0
    assert len([row for row in rows if row["bar"] is not None]) >= 9
    assert list(tmp_path.iterdir()) == []
