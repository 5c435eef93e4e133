"""A row that hangs is killed and named; one that fails says why; the others go on."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.perf.train_bench.launches import Order, run_row
from ghostvis_mega.perf.train_bench.progress import Stopped, stopping
from ghostvis_mega.perf.train_bench.rows import Row

SCRIPT = """
import json, os, pathlib, sys, time
order = json.loads(pathlib.Path(os.environ["GHOSTVIS_BENCH_TRAIN"]).read_text())
folder, rank = pathlib.Path(order["folder"]), os.environ["RANK"]
name = order["row"][0]
(folder / f"pid{rank}").write_text(str(os.getpid()))
if name == "hangs" and rank == "1":
    time.sleep(600)
if name == "fails" and rank == "0":
    # The other rank loses its connection later, with a reason that tells nothing.
    (folder / "reason0.txt").write_text("OutOfMemoryError: CUDA out of memory.")
    time.sleep(0.3)
    (folder / "reason1.txt").write_text("DistBackendError: connection closed by peer")
    sys.exit(1)
if name == "dies":
    os._exit(11)
if name in ("hangs", "fails"):
    time.sleep(600)
result = dict(name=name, kind="ours", processes=2, steps=[], failure=os.environ.get("SAID", ""))
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "rank.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def order_of(name: str, tmp_path: Path) -> Order:
    run = load_run_config("examples/configs/vlm_tiny_easyvqa.yaml", ["train.steps=7"])
    return Order(Row(name), run, warm_up=1, steps=2, folder=tmp_path / name)


def start(name: str, script: Path, tmp_path: Path, *, timeout_s: float = 60.0):
    order = order_of(name, tmp_path)
    return run_row(order, target=[str(script)], processes=2, timeout_s=timeout_s, device="cpu")


@pytest.mark.world_size(2)
def test_a_row_that_hangs_is_killed_whole_and_named(script: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    result = start("hangs", script, tmp_path, timeout_s=5.0)
    assert time.monotonic() - began < 60
    assert result.name == "hangs"
    assert "did not end within 5 s" in result.failure
    for rank in (0, 1):
        pid = (tmp_path / "hangs" / f"pid{rank}").read_text()
        assert not Path("/proc", pid).exists(), "no rank may hold its GPU any longer"


@pytest.mark.world_size(2)
def test_a_signal_ends_the_ranks_of_the_row_that_runs(script: Path, tmp_path: Path) -> None:
    pids = [tmp_path / "hangs" / f"pid{rank}" for rank in (0, 1)]
    alive = []

    def interrupt() -> None:
        while not all(pid.exists() and pid.read_text() for pid in pids):
            time.sleep(0.05)
        alive.extend(Path("/proc", pid.read_text()).exists() for pid in pids)
        # The second one comes while ranks are being killed.
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stopping():
        start("hangs", script, tmp_path)
    assert alive == [True, True]
    assert not any(Path("/proc", pid.read_text()).exists() for pid in pids)


@pytest.mark.world_size(2)
def test_a_row_that_fails_gives_the_first_ranks_reason(script: Path, tmp_path: Path) -> None:
    assert start("fails", script, tmp_path).failure == "OutOfMemoryError: CUDA out of memory."


@pytest.mark.world_size(2)
def test_a_row_that_dies_without_a_word_is_told_by_its_exit_code(script, tmp_path) -> None:
    assert "ended with 11" in start("dies", script, tmp_path).failure


@pytest.mark.world_size(2)
def test_a_row_that_runs_gives_its_result(script: Path, tmp_path: Path) -> None:
    result = start("runs", script, tmp_path)
    assert (result.name, result.failure, result.processes) == ("runs", "", 2)


@pytest.mark.world_size(2)
def test_a_rows_variables_reach_its_ranks(script: Path, tmp_path: Path) -> None:
    order = order_of("runs", tmp_path)
    row = Row("runs", environment=(("SAID", "hello"), ("OMP_NUM_THREADS", "3")))
    order = dataclasses.replace(order, row=row)
    result = run_row(order, target=[str(script)], processes=2, timeout_s=60.0, device="cpu")
    assert result.failure == "hello"
    assert "OMP_NUM_THREADS=3" in result.description["environment"]
    assert "CUDA_DEVICE_MAX_CONNECTIONS=" in result.description["environment"]


def test_a_rank_reads_the_order_as_it_was_written(tmp_path: Path) -> None:
    order = order_of("x", tmp_path)
    order.write(tmp_path / "order.json")
    assert Order.read(tmp_path / "order.json") == order
