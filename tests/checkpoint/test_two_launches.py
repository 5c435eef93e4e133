"""Two launches of one run at the same time: one trains, the other is refused and touches nothing.

Real launches of the example script on CPUs: a race, a latecomer, SIGKILL of all processes of the
one that trains, and a start that takes over from a node which is no more.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.checkpoint.folder import CheckpointFolder
from ghostvis_mega.checkpoint.lease import LEASE_FILE
from tests.launch import ROOT

RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, seq_length: 128}}
batch: {{global_size: 2}}
optim: {{schedule: constant}}
deepspeed: {{llm: {root}/ds_configs/zero1.json}}
train: {{steps: 100000, device: cpu, timeout_s: 120}}
checkpoint: {{save_every: 5}}
log: {{output: {folder}/run}}
"""
CPU_ONLY = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = [pytest.mark.world_size(2), pytest.mark.durability]


@dataclass
class Start:
    """One start of the run."""

    process: subprocess.Popen
    text: Path

    @property
    def said(self) -> str:
        return self.text.read_text()

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Run:
    """The run folder and all starts."""

    folder: Path
    starts: list[Start]

    def start(self, *overrides: str) -> Start:
        text = self.folder / f"start{len(self.starts)}.txt"
        command = [sys.executable, "examples/pretrain_vlm.py", "--config"]
        with text.open("w") as file:
            process = subprocess.Popen(
                [*command, str(self.folder / "run.yaml"), *overrides],
                cwd=ROOT,
                env=os.environ | CPU_ONLY,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.starts.append(Start(process, text))
        return self.starts[-1]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Closed lines of a file in the run folder."""
        path = self.folder / "run" / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def newest(self) -> int:
        return CheckpointFolder(self.folder / "run" / "checkpoints").last_step()

    def launch(self) -> dict[str, Any]:
        return json.loads((self.folder / "run" / LEASE_FILE).read_text())


def until(holds: Callable[[], object], what: str, *, timeout_s: float = 100) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def run(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("race")
    (folder / "run.yaml").write_text(RUN.format(data=easy_vqa, folder=folder, root=ROOT))
    run = Run(folder, [])
    yield run
    for start in run.starts:
        start.kill()


@pytest.fixture(scope="module")
def race(run: Run) -> tuple[Start, Start]:
    """The one that trains and the one that was refused, of two that were started together."""
    both = [run.start(), run.start()]
    until(lambda: any(s.process.poll() is not None for s in both), "neither was refused")
    loser = next(s for s in both if s.process.poll() is not None)
    winner = both[1 - both.index(loser)]
    until(lambda: run.newest() >= 5 or winner.process.poll() is not None, "no checkpoint")
    assert winner.process.poll() is None, winner.said
    return winner, loser


def refusal(start: Start, run: Run, holder: Start) -> None:
    """Exit code of wrong settings and one sentence that names the other launch."""
    assert start.process.returncode == 2, start.said
    assert start.said.count("is in use by launch") == 1 and "Traceback" not in start.said
    named = re.search(r"is in use by launch (\S+) on (\S+), which", start.said)
    assert named is not None
    assert {"launch": named[1], "host": named[2]} == run.launch()
    assert named[1].split("-")[2] == str(holder.process.pid)


def test_one_of_two_trains_and_the_other_touches_nothing(
    run: Run, race: tuple[Start, Start]
) -> None:
    winner, loser = race
    refusal(loser, run, winner)
    # A launch that came as far as its account would have written a line there.
    assert sum(row["kind"] == "launch" for row in run.rows("goodput.jsonl")) == 1
    assert not re.search(r"step \d+/|built|parameters", loser.said)


def test_one_that_comes_later_is_refused_before_torch_is_imported(
    run: Run, race: tuple[Start, Start]
) -> None:
    late = run.start("checkpoint.resume=none")  # which would delete the run's account
    until(lambda: late.process.poll() is not None, "the latecomer was not refused")
    refusal(late, run, race[0])
    assert sum(row["kind"] == "launch" for row in run.rows("goodput.jsonl")) == 1
    probe = (
        "import sys; from pathlib import Path; from ghostvis_mega.checkpoint.lock import in_use;"
        "assert 'is in use' in in_use(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    output = str(run.folder / "run")
    subprocess.run([sys.executable, "-c", probe, output], cwd=ROOT, check=True, timeout=60)


def test_after_a_kill_a_launch_takes_over_at_once_also_from_another_node(
    run: Run, race: tuple[Start, Start]
) -> None:
    winner, _ = race
    winner.kill()
    newest = run.newest()
    dead = run.launch()
    (run.folder / "run" / LEASE_FILE).write_text(json.dumps(dead | {"host": "n17"}))
    steps = newest + 3
    again = run.start(f"train.steps={steps}")
    until(lambda: again.process.poll() is not None, "the last start did not end")
    assert again.process.returncode == 0, again.said
    assert f"resumed after step {newest}" in again.said or f"after step {newest}" in again.said
    assert "waiting up to" not in again.said and "is in use" not in again.said
    assert run.launch()["launch"].split("-")[2] == str(again.process.pid)
    assert run.launch()["host"] == dead["host"]
    assert [row["step"] for row in run.rows("metrics.jsonl")] == list(range(1, steps + 1))
    assert sum(row["kind"] == "launch" for row in run.rows("goodput.jsonl")) == 2
