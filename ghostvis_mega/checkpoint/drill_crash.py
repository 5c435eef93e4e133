"""Kills a save at every point and at random times, and looks at what a restarted run would find.

Each trial starts from a folder with two checkpoints and saves the next one (`next`) or the newest
one again (`again`, as a run does that went back). Whatever happens, the newest complete checkpoint
must be the state of its step, at most one interval old; nothing incomplete may have a final name;
and the next save must succeed and clean up.
"""

import errno
import hashlib
import mmap
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from ghostvis_mega.checkpoint import saving
from ghostvis_mega.checkpoint.drill_points import Points, PowerCut, watch
from ghostvis_mega.checkpoint.drill_state import content_problem, drill_snapshot
from ghostvis_mega.checkpoint.folder import CheckpointFolder, open_complete
from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.checkpoint.snapshot import Snapshot
from ghostvis_mega.checkpoint.tensors import write_buffer
from ghostvis_mega.train.progress import Progress
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.forks import ForkedRanks, run_forked

Scenario = Literal["next", "again"]
Fault = Literal["prune-first", "manifest-first", "no-fsync"]
_OLD = (1, 2)
_TRIAL_S = 60.0
_NEEDS_ROOM = ("create", "write", "half of write", "mkdir")
"""Points that fail on a full disk."""
_LIMITS = (1, 1000, 4000, 8000)
_MIXED = 3
"""Of the trials with several ranks, every third kills one alone; in the others all die."""


@dataclass
class Findings:
    """What a drill has seen."""

    points: set[str] = field(default_factory=set)
    trials: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CrashDrill:
    """Trials of one kind.

    Args:
        work: Existing directory for all files.
        ranks: Processes that save together.
        keep: Complete checkpoints that stay.
        fault: What is broken on purpose; the drill must find it.
    """

    work: Path
    ranks: int
    keep: int = 1
    fault: Fault | None = None

    def every_point(self, findings: Findings) -> None:
        """A trial for every point of every rank, in both scenarios."""
        for scenario in self.scenarios:
            named = self._run(partial(self._name_points, scenario))
            for rank, names in enumerate(named):
                findings.points |= {f"{scenario}: rank {rank}: {name}" for name in names}
                for number, name in enumerate(names):
                    self._kill_at(findings, scenario, rank, number, name)

    def _kill_at(
        self, findings: Findings, scenario: Scenario, rank: int, number: int, name: str
    ) -> None:
        self._fresh()
        action = partial(self._die_at, scenario, rank, number)
        with ForkedRanks(action, ranks=self.ranks, folder=self.work) as forked:
            end = time.monotonic() + _TRIAL_S
            alone = self.ranks > 1 and number % _MIXED == 0
            while not forked.poll() and (alone or rank not in forked.ended):
                if time.monotonic() > end:
                    findings.problems.append(f"{name}: the other ranks did not end")
                    break
                time.sleep(0.002)
        code = forked.ended[rank]
        if code != -signal.SIGKILL:
            findings.problems.append(f"{name}: ended with {code}\n{forked.output(rank)[-2000:]}")
        self._look(findings, f"{scenario}: kill rank {rank} at {name}", at_least=2, at_most=3)

    def power_cuts(self, findings: Findings) -> None:
        """What the disk may hold at every point of a single rank's save, one trial each."""
        assert self.ranks == 1, "the copies are of one process"
        for scenario in self.scenarios:
            self._fresh()
            out = self.work / "cuts"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            self._run(partial(self._cut_power, scenario, out))
            for copy in sorted(out.iterdir()):
                shutil.rmtree(self._checkpoints)
                os.replace(copy, self._checkpoints)
                name = f"{scenario}: power cut at point {copy.name}"
                self._look(findings, name, at_least=2, at_most=3)

    def full_disks(self, findings: Findings) -> None:
        """A disk that is full from some point on, at every point of the last rank's save; then
        true limits of the system on the size of a file."""
        names = self._run(partial(self._name_points, "next"))[-1]
        trials = {
            f"full disk from {name}": partial(self._run_out, number)
            for number, name in enumerate(names)
            if name.startswith(_NEEDS_ROOM)
        }
        trials |= {f"files of {size} bytes at most": partial(self._limit, size) for size in _LIMITS}
        for name, action in trials.items():
            for told in self._run(action):
                if "could not be saved" not in told:
                    findings.problems.append(f"{name}: a rank is told {told!r}")
            self._look(findings, name, at_least=2, at_most=3)

    def random_times(self, findings: Findings, *, kills: int, seed: int) -> None:
        """Kill ranks that save in a loop at times drawn at random."""
        draw = random.Random(seed)
        for trial in range(kills):
            self._fresh()
            with mmap.mmap(-1, mmap.PAGESIZE) as shared:
                action = partial(self._save_on_and_on, shared)
                with ForkedRanks(action, ranks=self.ranks, folder=self.work) as forked:
                    end = time.monotonic() + _TRIAL_S
                    while not shared[0] and time.monotonic() < end:
                        time.sleep(0.001)
                    time.sleep(draw.uniform(0.0, 0.03))
                    # Every other time all at once, as a node that dies.
                    forked.kill(None if trial % 2 else [draw.randrange(self.ranks)])
                done, begun = shared[1], shared[0]
                if not begun:
                    findings.problems.append(f"trial {trial} did not begin\n{forked.output(0)}")
            name = f"random kill {trial}, after {done} of {begun}"
            self._look(findings, name, at_least=max(done, 2), at_most=max(begun, 2))

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        """One shows what is broken as well as two."""
        return ("next", "again") if self.fault is None else ("next",)

    @property
    def _checkpoints(self) -> Path:
        return self.work / "checkpoints"

    def _fresh(self) -> None:
        """The folder before a trial."""
        template = self.work / "template"
        if not template.exists():
            folder = CheckpointFolder(template)
            for step in _OLD:
                for_one = drill_snapshot(step, rank=0, ranks=1)
                saving.write_checkpoint(folder, for_one, extra={}, keep=2, group=None)
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        shutil.copytree(template, self._checkpoints)

    def _run(self, action: Callable[[int], Any]) -> list[Any]:
        self._fresh()
        return run_forked(action, ranks=self.ranks, folder=self.work, timeout_s=_TRIAL_S)

    def _save(self, step: int, rank: int) -> None:
        snapshot = drill_snapshot(step, rank=rank, ranks=self.ranks)
        with _broken(self.fault):
            saving.write_checkpoint(
                CheckpointFolder(self._checkpoints), snapshot, extra={}, keep=self.keep, group=None
            )

    def _join(self) -> None:
        if self.ranks > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=_TRIAL_S))

    def _name_points(self, scenario: Scenario, rank: int) -> list[str]:
        self._join()
        points = Points(at=lambda number, name: None)
        with watch(points):
            self._save(_step(scenario), rank)
        return points.names

    def _die_at(self, scenario: Scenario, victim: int, number: int, rank: int) -> None:
        self._join()

        def at(passed: int, name: str) -> None:
            if rank == victim and passed == number:
                os.kill(os.getpid(), signal.SIGKILL)

        with watch(Points(at=at)):
            self._save(_step(scenario), rank)

    def _run_out(self, number: int, rank: int) -> str:
        self._join()

        def at(passed: int, name: str) -> None:
            if rank == self.ranks - 1 and passed >= number and name.startswith(_NEEDS_ROOM):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with watch(Points(at=at)):
            return self._told(rank)

    def _limit(self, size: int, rank: int) -> str:
        self._join()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == self.ranks - 1:
            # Python ignores the signal that comes with it, so that writes fail.
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        told = self._told(rank)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return told

    def _told(self, rank: int) -> str:
        try:
            self._save(3, rank)
        except CheckpointError as error:
            return str(error)
        return "nothing"

    def _cut_power(self, scenario: Scenario, out: Path, rank: int) -> None:
        with PowerCut(self._checkpoints, out).watch():
            self._save(_step(scenario), rank)

    def _save_on_and_on(self, shared: mmap.mmap, rank: int) -> None:
        self._join()
        for step in range(3, 250):
            if rank == 0:
                shared[0] = step
            self._save(step, rank)
            if rank == 0:
                shared[1] = step

    def _look(self, findings: Findings, name: str, *, at_least: int, at_most: int) -> None:
        """What a restarted run finds, then its next save."""
        findings.trials += 1
        folder = CheckpointFolder(self._checkpoints)
        problems = []
        for path in folder.candidates():
            try:
                open_complete(path)
            except CheckpointError as error:
                problems.append(f"it has its final name: {error}")
        try:
            newest = folder.newest()
        except CheckpointError as error:
            problems.append(str(error))
            newest = None
        if newest is None:
            problems.append("no checkpoint is left")
        else:
            step = read_manifest(newest).step
            if not at_least <= step <= at_most:
                problems.append(f"step {step} is found, not {at_least} to {at_most}")
            if problem := content_problem(newest):
                problems.append(problem)
            if not problems:
                problems += self._next_save(folder, step + 1)
        findings.problems += [f"{name}: {problem}" for problem in problems]

    def _next_save(self, folder: CheckpointFolder, step: int) -> Iterator[str]:
        snapshot = drill_snapshot(step, rank=0, ranks=1)
        saving.write_checkpoint(folder, snapshot, extra={}, keep=self.keep, group=None)
        if folder.newest() != folder.directory(step):
            yield f"the next save is not found: {folder.newest()}"
        left = sorted(path.name for path in folder.path.iterdir() if ".tmp" in path.name)
        stale = [name for name in left if not name.startswith("latest")]
        if stale:
            yield f"the next save left {stale}"
        if len(folder.complete()) > self.keep:
            yield f"{len(folder.complete())} checkpoints are kept, not {self.keep}"


def _step(scenario: Scenario) -> int:
    return 3 if scenario == "next" else 2


@contextmanager
def _broken(fault: Fault | None) -> Iterator[None]:
    """A save that does things in a wrong order, or not at all."""
    real = saving._write_own, saving._finish, saving.size_problem, os.fsync
    publish = CheckpointFolder.publish
    if fault == "prune-first":
        CheckpointFolder.publish = _delete_then_publish(publish)
    elif fault == "manifest-first":
        saving._write_own, saving._finish = _only_digests, _manifest_then_files(saving._finish)
        saving.size_problem = lambda directory, name, info: None
    elif fault == "no-fsync":
        os.fsync = lambda descriptor: None
    try:
        yield
    finally:
        saving._write_own, saving._finish, saving.size_problem, os.fsync = real
        CheckpointFolder.publish = publish


def _delete_then_publish(publish: Callable[..., Path]) -> Callable[..., Path]:
    def wrong(folder: CheckpointFolder, step: int) -> Path:
        for old in folder.complete():
            shutil.rmtree(old.path)
        return publish(folder, step)

    return wrong


def _only_digests(snapshot: Snapshot, folder: Path, progress: Progress) -> saving.Part:
    files = {
        name: snapshot.entries[name] | {"sha256": hashlib.sha256(content.numpy()).hexdigest()}
        for name, content in snapshot.files.items()
    }
    return saving.Part({**snapshot.about, "files": files})


def _manifest_then_files(finish: Callable[..., Path]) -> Callable[..., Path]:
    def wrong(folder: CheckpointFolder, snapshot: Snapshot, *args: Any, **options: Any) -> Path:
        path = finish(folder, snapshot, *args, **options)
        for name, content in snapshot.files.items():
            write_buffer(path / name, content)
        return path

    return wrong
