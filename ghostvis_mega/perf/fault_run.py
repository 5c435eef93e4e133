"""A run that a drill starts as people do, breaks from outside, and starts again."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ghostvis_mega.perf.stress_data import write_datasets
from ghostvis_mega.perf.stress_layouts import (
    LAYOUTS,
    ROWS,
    StressJob,
    settings_of,
    write_deepspeed_files,
)
from ghostvis_mega.utils.errors import TrainingError
from ghostvis_mega.utils.launch import TRAIN_SCRIPT, device_environment, started_ranks

log = logging.getLogger(__name__)

ENDLESS = 1_000_000
"""Steps that no drill comes to the end of."""
_POLL_S = 0.005
_QUIET_S = 0.5


def write_small_run(folder: Path, *, cuda: bool, processes: int) -> Path:
    """A tiny model's settings and data in a new folder; the path of the settings."""
    job = StressJob(folder, LAYOUTS[:1], steps=ENDLESS, seed=0, step_timeout_s=300)
    write_datasets(folder / "data")
    write_deepspeed_files(job)
    run = settings_of(LAYOUTS[0], job, steps=ENDLESS, cuda=cuda)
    settings = run.model_dump(mode="json", exclude_unset=True)
    settings["batch"] = {"global_size": max(ROWS, processes)}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@dataclass(frozen=True)
class FaultRun:
    """The run of one drill."""

    config: Path
    overrides: tuple[str, ...]
    folder: Path
    """Takes the run and what its ranks print."""
    processes: int
    device: str
    start_timeout_s: float
    """From a start to the step that is waited for, or to the end of its ranks."""

    @property
    def output(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def settings(self, *, steps: int, save_every: int, timeout_s: float) -> list[str]:
        """All that is set beside the file of settings."""
        return [
            "optim.schedule=constant",  # so that a later start may have another number of steps
            *self.overrides,
            f"train.steps={steps}",
            f"train.timeout_s={timeout_s:g}",
            f"checkpoint.save_every={save_every}",
            "checkpoint.save_at_end=true",
            "checkpoint.keep=2",
            "checkpoint.export_hf=none",
            "log.preview_steps=[]",
            "log.evaluate=false",
            f"log.output={self.output}",
        ]

    @contextlib.contextmanager
    def started(self, name: str, settings: list[str]) -> Iterator[list[subprocess.Popen]]:
        """All ranks; none outlives the block."""
        log.info("%s: %d ranks on %s", name, self.processes, self.device)
        with started_ranks(
            [str(TRAIN_SCRIPT), "--config", str(self.config), *settings],
            ranks=self.processes,
            fuse_s=3 * self.start_timeout_s + 600,
            folder=self.folder / name,
            environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            | device_environment(self.device),
        ) as ranks:
            yield ranks

    def rows(self) -> list[dict[str, Any]]:
        """Closed lines of `metrics.jsonl`."""
        path = self.output / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def newest(self) -> int:
        """Step of the newest complete checkpoint, 0 without one."""
        # One that is being written has another name until it is whole.
        found = (self.output / "checkpoints").glob("step-*[0-9]/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def train_to(self, name: str, ranks: list[subprocess.Popen], steps: int) -> None:
        """Wait until the run has reported this many steps.

        Raises:
            TrainingError: A rank ended before, or time is up; with what the ranks printed last.
        """
        self._wait(name, lambda: len(self.rows()) >= steps, ranks, what=f"step {steps}")

    def end_of(self, name: str, ranks: list[subprocess.Popen], *, seconds: float) -> list[int]:
        """Exit codes of these ranks, which should end by themselves.

        Raises:
            TrainingError: They did not.
        """
        end = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > end:
                raise TrainingError(self._story(name, f"did not end within {seconds:g} s"))
            time.sleep(_POLL_S)
        return [rank.returncode for rank in ranks]

    def freeze(self, process: subprocess.Popen) -> int:
        """Stop a rank, which makes the others wait for it; the steps reported until then."""
        process.send_signal(signal.SIGSTOP)
        rows = self.rows()
        # Others may end the step that they are in, and report it.
        quiet_s = max(_QUIET_S, 2 * rows[-1]["seconds"] if rows else 0.0)
        since, known = time.monotonic(), len(rows)
        while time.monotonic() - since < quiet_s:
            time.sleep(_POLL_S)
            if (now := len(self.rows())) != known:
                since, known = time.monotonic(), now
        return known

    def _wait(
        self, name: str, holds: Callable[[], bool], ranks: list[subprocess.Popen], *, what: str
    ) -> None:
        end = time.monotonic() + self.start_timeout_s
        while not holds():
            if ended := [r.returncode for r in ranks if r.poll() is not None]:
                raise TrainingError(self._story(name, f"ended with {ended[0]} before {what}"))
            if time.monotonic() > end:
                raise TrainingError(
                    self._story(name, f"did not reach {what} within {self.start_timeout_s:g} s")
                )
            time.sleep(_POLL_S)

    def _story(self, name: str, what: str) -> str:
        lines = [f"{name}: a rank {what}"]
        for rank in range(self.processes):
            path = self.folder / name / f"output{rank}.txt"
            tail = path.read_text(errors="replace")[-3000:] if path.exists() else ""
            lines.append(f"rank {rank} printed last:\n{tail.rstrip()}")
        return "\n".join(lines)


def lost_or_repeated(rows: list[dict[str, Any]], *, steps: int) -> int:
    """Steps of 1 to `steps` that are not there exactly once."""
    seen = [row["step"] for row in rows]
    return sum(seen.count(step) != 1 for step in range(1, steps + 1)) + sum(s > steps for s in seen)
