"""The search for the longest sequence ends at it, soon; the command tries what it says."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ghostvis_mega.cli import bench_longest as command
from ghostvis_mega.cli.main import app
from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.perf.train_bench.launches import Order
from ghostvis_mega.perf.train_bench.longest import (
    CLOSE,
    LENGTHS_OF,
    Mode,
    Search,
    Try,
    default_modes,
    figures_of,
    find_longest,
    prediction,
    settings_of,
)
from ghostvis_mega.perf.train_bench.plans import Plan
from ghostvis_mega.perf.train_bench.preset_parts import DEEPSPEED
from ghostvis_mega.perf.train_bench.results import RowResult, StepRecord, failed
from ghostvis_mega.perf.train_bench.rows import Row

GIB = 1024**3
SEARCH = Search(first=16_384, most=2**20, grain=1024)
NO_MEMORY = "OutOfMemoryError: CUDA out of memory."


def trained(row: Row, allocated: int | None, device: int | None = 80 * GIB) -> RowResult:
    steps = [StepRecord(9.0 - n, 100, 99, 0, 1e12, 0.0, 0.0, {}, 1.0) for n in range(2)]
    return RowResult(
        row.name,
        warm_up=1,
        steps=steps,
        kind=row.kind,
        allocated_bytes=allocated,
        device_bytes=device,
    )


class Device:
    """Memory that a try takes: linear in its length, a little bent."""

    def __init__(self, longest: int, *, base_gib: float = 20.0, tells: bool = True):
        self.longest, self.base_gib, self.tells = longest, base_gib, tells

    def __call__(self, length: int) -> RowResult:
        row = Row(f"as it is, {length}", may_not_fit=True)
        if length > self.longest:
            return failed(row, NO_MEMORY)
        share = (length / self.longest) ** 1.05
        allocated = int((self.base_gib + (77.0 - self.base_gib) * share) * GIB)
        return trained(row, allocated if self.tells else None)


def answer(tries: list[Try]) -> tuple[int, int]:
    fits = max((one.length for one in tries if one.fits), default=0)
    return fits, min((one.length for one in tries if not one.fits), default=0)


@pytest.mark.parametrize("tells", [True, False], ids=["by the line", "by halves"])
@pytest.mark.parametrize("longest", [1024, 9000, 20_000, 61_000, 130_000, 500_000])
def test_the_search_ends_at_the_longest(longest: int, tells: bool) -> None:
    tries = list(find_longest(SEARCH, Device(longest, tells=tells)))
    fits, over = answer(tries)
    assert fits <= longest < over
    assert over - fits <= max(SEARCH.grain, fits // CLOSE)
    assert all(one.length % SEARCH.grain == 0 for one in tries)
    assert len({one.length for one in tries}) == len(tries), "a length was tried twice"
    assert len(tries) <= (7 if tells else 12)


def test_the_line_saves_tries() -> None:
    by_line, by_halves = (
        len(list(find_longest(SEARCH, Device(500_000, tells=tells)))) for tells in (True, False)
    )
    assert by_line < by_halves


@pytest.mark.parametrize("longest", [20_000, 61_000, 130_000, 500_000])
def test_a_prediction_saves_tries_and_changes_nothing(longest: int) -> None:
    device, told = Device(longest), Device(longest, base_gib=17.0)

    def predicted(length: int) -> int:
        share = (length / longest) ** 1.05
        return int((told.base_gib + (77.0 - told.base_gib) * share) * GIB)

    search = replace(SEARCH, predicted=predicted)
    tries = list(find_longest(search, device))
    fits, over = answer(tries)
    assert fits <= longest < over <= fits + max(SEARCH.grain, fits // CLOSE)
    assert len(tries) <= min(5, len(list(find_longest(SEARCH, device))))
    wrong = replace(SEARCH, predicted=lambda length: 40 * predicted(length))
    fits, over = answer(list(find_longest(wrong, device)))
    assert fits <= longest < over <= fits + max(SEARCH.grain, fits // CLOSE)


def test_the_prediction_of_a_mode_is_that_of_its_settings(tmp_path: Path) -> None:
    file = Plan(settings=settings_of("1.5b")).write(tmp_path)
    again = load_run_config(file, ["train.recompute=full"])
    total = prediction(again, processes=1, replicas=1)
    # docs/performance.md: 62.3 GiB.
    assert total is not None and total(196_608) / GIB == pytest.approx(62.3, rel=0.01)
    host = load_run_config(file, [f"deepspeed.llm={DEEPSPEED / 'zero2_offload.json'}"])
    assert prediction(host, processes=1, replicas=1) is None


def test_nothing_longer_than_asked_for_is_tried() -> None:
    tries = list(find_longest(Search(16_384, 40_000, 1024), Device(500_000)))
    assert answer(tries) == (39_936, 0)


def test_where_nothing_fits_the_search_ends_at_the_grain() -> None:
    tries = list(find_longest(SEARCH, Device(100)))
    assert answer(tries) == (0, 1024)
    (longest, over) = figures_of(Mode("as it is", ()), tries)
    assert (longest["value"], over["value"]) == (None, 1024)


def test_a_failure_that_is_not_for_memory_ends_the_mode() -> None:
    row = Row("as it is", may_not_fit=True)
    tries = list(find_longest(SEARCH, lambda length: failed(row, "ValueError: no such layer")))
    assert len(tries) == 1
    (figure,) = figures_of(Mode("as it is", ()), tries)
    assert figure["ok"] is False and "no such layer" in str(figure["value"])


@pytest.mark.parametrize("size", LENGTHS_OF)
def test_modes_of_more_processes_are_cut(size: str) -> None:
    cut = {f"parallel.{axis}=2" for axis in ("tensor", "context")}
    assert all(not cut & set(mode.settings) for mode in default_modes(size, 1))
    assert all(len(cut & set(mode.settings)) == 1 for mode in default_modes(size, 2))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "longest", "--size", "tiny", *arguments])


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Order]]:
    """Of all launches, for which a device that takes 300 tokens stands in."""
    orders: list[Order] = []

    def run_row(order: Order, **_: Any) -> RowResult:
        orders.append(order)
        assert Path(order.run.data.train, "manifest.json").exists(), "no data"
        return Device(300)(order.run.data.seq_length)

    monkeypatch.setattr(command, "run_row", run_row)
    yield orders


LENGTHS = ("--from", "128", "--to", "1024", "--grain", "64")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--size", "70b"), "--size 70b is unknown"),
        (("--from", "64", "--to", "32", "--grain", "16"), "fall in this order"),
        ((*LENGTHS, "--mode", "a: train.stepz=1"), "train.stepz is not a setting"),
        ((*LENGTHS, "--mode", "a: parallel.tensor=3"), "parallel.tensor=3"),
        ((*LENGTHS, "--mode", "a:", "--mode", "a:"), "two modes are called 'a'"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(
    orders: list[Order], arguments: tuple[str, ...], word: str
) -> None:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert word in " ".join(result.output.split())
    assert orders == []


def test_each_mode_is_searched_and_kept(orders: list[Order], tmp_path: Path) -> None:
    file = tmp_path / "longest.json"
    modes = ("--mode", "kept:", "--mode", "again: train.recompute=full parallel.context=2")
    result = call(*LENGTHS, "--processes", "2", *modes, "--save", str(file), "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row["value"] for row in json.loads(result.stdout)}
    assert rows["kept: longest that fits"] == rows["again: longest that fits"] == 256
    assert rows["kept: does not fit"] == 320
    assert rows["again: peak allocated"] > 20
    assert json.loads(file.read_text())["figures"] == json.loads(result.stdout)
    first, last = orders[0].run, orders[-1].run
    # A sequence for each replica: two whole ones, or one that is cut in two.
    assert (first.batch.global_size, last.batch.global_size) == (2, 1)
    assert last.train.recompute == "full" and last.model.vision is None
    assert all(o.run.model.llm.max_positions == o.run.data.seq_length for o in orders)


@pytest.mark.world_size(2)
def test_a_try_really_trains() -> None:
    lengths = ("--from", "128", "--to", "128", "--grain", "64")
    result = call(*lengths, "--processes", "2", "--mode", "cut: parallel.context=2", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row["value"] for row in json.loads(result.stdout)}
    assert rows["cut: longest that fits"] == 128
    assert rows["cut: useful tokens"] > 0
