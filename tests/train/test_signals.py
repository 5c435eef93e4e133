"""A signal to any of the ranks: all save and stop, and the next start loses and repeats nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.train.signals import EXIT_REQUEUE, StopRequest
from tests.launch import ROOT, launch

RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, seq_length: 128, augment: true}}
batch: {{global_size: 2}}
optim: {{schedule: constant}}
deepspeed: {{llm: {root}/ds_configs/zero1.json}}
train: {{steps: 10000, device: cpu, timeout_s: 60, deterministic: true}}
checkpoint: {{save_every: 0}}
log: {{output: {folder}/run}}
"""
CASES = [f"{d}, {w} workers" for d in ("one rank", "all ranks", "process groups") for w in (0, 2)]


@pytest.fixture(scope="module")
def config(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    path = folder / "run.yaml"
    path.write_text(RUN.format(data=easy_vqa, root=ROOT, folder=folder))
    return path


@pytest.fixture(scope="module")
def runs(config: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each case what the ranks and the disk say after each start."""
    worker = Path(__file__).with_name("signals_worker.py")
    folder = config.parent / "ranks"
    return launch(worker, ranks=2, timeout_s=200, folder=folder, args=[str(config)])


pytestmark = [pytest.mark.world_size(2), pytest.mark.durability]


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_save_and_stop_before_the_same_step(runs: dict[str, Any], case: str) -> None:
    first = runs[case][0]
    name = "SIGUSR1" if case.startswith("all ranks") else "SIGTERM"
    number = int(signal.Signals[name])
    assert [r["agreed"] for r in first["ranks"]] == [number, number]
    assert [r["status"] for r in first["ranks"]] == [f"stopped by {name}"] * 2
    # The rank that was not asked stops because the other one was.
    expected = [0, number] if case.startswith("one rank") else [number, number]
    assert [r["asked"] for r in first["ranks"]] == expected
    # Sent after step 2, while step 3 is not begun or under way.
    done = len(first["losses"])
    assert done in (2, 3)
    assert first["at"] == f"step-{done:08d}"


@pytest.mark.parametrize("case", CASES)
def test_no_step_is_lost_or_repeated(runs: dict[str, Any], case: str) -> None:
    first, second = runs[case]
    whole = runs["nobody"][0]
    assert [r["status"] for r in second["ranks"]] == ["finished"] * 2
    assert first["losses"] == whole["losses"][: len(first["losses"])]
    assert second["losses"] == whole["losses"]
    assert [step for step, _ in second["losses"]] == [1, 2, 3, 4]
    # Not the random generators: all starts of this test are in one process, which seeds them once.
    names = [n for n in whole["files"] if n.startswith(("llm", "vision", "optimizer"))]
    assert len(names) > 2
    assert {n: second["files"][n] for n in names} == {n: whole["files"][n] for n in names}
    # What the comparison would notice: a checkpoint of another step.
    assert first["files"] != whole["files"]


def test_a_run_that_nobody_stops_goes_to_its_end(runs: dict[str, Any]) -> None:
    [run] = runs["nobody"]
    assert run["ranks"] == [{"status": "finished", "asked": 0, "agreed": 0, "moved": True}] * 2
    assert len(run["losses"]) == 4


def test_the_script_ends_with_the_exit_code_for_requeue(config: Path) -> None:
    output = config.parent / "script"
    command = [sys.executable, "examples/pretrain_vlm.py", "--config", str(config)]
    with (config.parent / "script.txt").open("w") as text:
        process = subprocess.Popen(
            [*command, f"log.output={output}"], cwd=ROOT, stdout=text, stderr=subprocess.STDOUT
        )
    try:
        metrics, deadline = output / "metrics.jsonl", time.monotonic() + 100
        while not metrics.is_file() or not metrics.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, text.name
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert code == EXIT_REQUEUE == 85
    done = len(metrics.read_text().splitlines())
    assert json.loads((output / "summary.json").read_text())["status"] == "stopped by SIGTERM"
    assert (output / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()


def test_a_request_is_only_remembered() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        request = StopRequest.on_signals()
        assert (request.asked, request.agreed) == (0, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (request.asked, request.agreed) == (signal.SIGUSR1, 0)
        request.agree(signal.SIGTERM, done=3)
        assert request.reason == "stopped by SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
