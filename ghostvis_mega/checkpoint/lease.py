"""Which launch a run folder belongs to: the one that started last.

Two launches that save into one folder would remove each other's half-written checkpoints. While
the first lives, `checkpoint.lock` keeps the second out. Where the file system cannot tell whether
it lives, the second takes the folder over, and the first, which finds it taken, stops. So what a
dead launch left behind never keeps a run from starting.
"""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_mega.utils.errors import CheckpointError, FolderTakenError
from ghostvis_mega.utils.files import atomic_write_json, read_small

LEASE_FILE = "launch.json"


@dataclass(frozen=True)
class Start:
    """A start of a Slurm job, which `sbatch --requeue` may start several times."""

    job: str = ""
    """Its number; empty outside Slurm."""
    restart: int = 0

    def follows(self, other: "Start") -> bool:
        """Whether this is a later start of the same job: then the other one is over."""
        return bool(self.job) and self.job == other.job and self.restart > other.restart


def own_start(environment: Mapping[str, str] = os.environ) -> Start:
    """Of the job that this process is in."""
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return Start(environment.get("SLURM_JOB_ID", ""), int(restart) if restart.isdecimal() else 0)


@dataclass(frozen=True)
class Holder:
    """Whom a run folder belongs to, by its `launch.json`."""

    launch: str
    host: str
    start: Start = Start()

    @property
    def name(self) -> str:
        """For people."""
        job = f", Slurm job {self.start.job}" if self.start.job else ""
        return f"launch {self.launch} on {self.host}{job}"


def read_holder(folder: Path) -> Holder | None:
    """The launch that a run folder names; None where it names none that could be read."""
    try:
        found = json.loads(read_small(folder / LEASE_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    return _holder(found)


def _holder(document: Any) -> Holder | None:
    if not isinstance(document, dict):
        return None
    launch, host, job, restart = (document.get(k) for k in ("launch", "host", "job", "restart"))
    if not isinstance(launch, str) or not isinstance(host, str):
        return None
    known = isinstance(job, str) and type(restart) is int
    return Holder(launch, host, Start(job, restart) if known else Start())


class Lease:
    """The hold of one launch on a run folder; its first rank alone reads and writes.

    Args:
        folder: Of the run, `log.output`.
        launch: Its name, which no other has.
    """

    def __init__(self, folder: Path, *, launch: str):
        self.path = folder / LEASE_FILE
        start = own_start()
        self._own: dict[str, Any] = {"launch": launch, "host": socket.gethostname()}
        if start.job:
            self._own |= {"job": start.job, "restart": start.restart}

    def take(self) -> None:
        """Take the folder over, from whomever.

        Raises:
            CheckpointError: The file cannot be written, so that two launches could not tell whose
                the folder is.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self.path, self._own)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}, which says whose this folder is, cannot be written: "
                f"{error.strerror}. Make room or name another log.output"
            ) from error

    def check(self) -> None:
        """Nothing, while the folder is this launch's; also where the file is gone.

        Raises:
            FolderTakenError: Another launch has it.
            CheckpointError: The file says nothing.
        """
        try:
            found = json.loads(read_small(self.path))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        if found != self._own:
            raise FolderTakenError(
                f"{self.path.parent} now belongs to {_named(found)}, which started later than this "
                f"one, {_named(self._own)}. This one stops, since each would remove what the other "
                "saves; give runs that live at the same time a log.output of their own"
            )


def _named(document: Any) -> str:
    holder = _holder(document)
    return "a launch without a name" if holder is None else holder.name
