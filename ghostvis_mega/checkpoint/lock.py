"""Whether the launch that has a run folder still lives, as far as the file system can tell.

The first rank of a launch holds a lock on a file of the folder. The kernel gives it back when that
process ends, however it ends, so a dead launch keeps nobody out; while it lives a second launch is
refused before it touches a file of the run. On a file system without locks, or whose locks end at
the node (Lustre with `localflock`, NFS with `nolock`), two launches may both begin; then
`checkpoint.lease` decides, and the earlier one stops at its next save.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from ghostvis_mega.checkpoint.lease import Holder, own_start, read_holder
from ghostvis_mega.utils.errors import CheckpointError

log = logging.getLogger(__name__)

LOCK_FILE = "launch.lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_DYING_S = 5.0
"""How long a process of this host that was killed may take to be gone."""
_UNREACHABLE_S = 120.0
"""How long a file server may keep the lock of a node that has died; NFS: 90 s."""
_POLL_S = 0.1


class FolderLock:
    """The hold of this process on a run folder.

    Args:
        folder: Of the run, `log.output`.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self._descriptor: int | None = None

    def take(self) -> str | None:
        """Hold the folder from now on.

        Returns:
            None, or the sentence that says which launch keeps this one out.

        Raises:
            CheckpointError: The file cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}, which says whether this folder is in use, cannot be made: "
                f"{error.strerror}. Make room or name another log.output"
            ) from error
        problem = _wait(descriptor, fcntl.LOCK_EX, self.path)
        if problem is None:
            self._descriptor = descriptor
        else:
            os.close(descriptor)
        return problem

    def release(self) -> None:
        """Let others in; nothing where nothing is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def in_use(folder: Path) -> str | None:
    """The sentence that says which launch keeps others out of a run folder; None: none does.

    Nothing is written; several processes may ask at once.

    Raises:
        CheckpointError: There is a lock file that cannot be opened.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"{path}, which says whether this folder is in use, cannot be opened: "
            f"{error.strerror}. Make it writable or name another log.output"
        ) from error
    try:
        return _wait(descriptor, fcntl.LOCK_SH, path)
    finally:
        os.close(descriptor)


def _wait(descriptor: int, kind: int, path: Path) -> str | None:
    """Lock within the time that a dead holder may need to be gone; else who is in the way."""
    began, told = time.monotonic(), False
    while not _locked(descriptor, kind, path):
        holder = read_holder(path.parent)
        if holder is not None and own_start().follows(holder.start):
            log.warning(
                "%s is still locked by %s, an earlier start of this Slurm job, which is over for "
                "Slurm; should it live, it stops at its next save", path.parent, holder.name,
            )  # fmt: skip
            return None
        near = holder is None or holder.host == socket.gethostname()
        limit_s = _DYING_S if near else _UNREACHABLE_S
        if time.monotonic() - began > limit_s:
            return _refusal(path, holder)
        if not told and not near:
            log.info(
                "%s is in use by %s; waiting up to %.0f s, for that node may have died",
                path.parent, holder.name, limit_s,
            )  # fmt: skip
            told = True
        time.sleep(_POLL_S)
    return None


def _locked(descriptor: int, kind: int, path: Path) -> bool:
    """Try to lock; also true, with a warning, where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise CheckpointError(f"{path} cannot be locked: {error.strerror}") from error
        log.warning(
            "%s cannot be locked (%s): a second launch here would not be refused; the earlier one "
            "would stop at its next save", path, error.strerror,
        )  # fmt: skip
    return True


def _refusal(path: Path, holder: Holder | None) -> str:
    who = "a launch that has just begun" if holder is None else holder.name
    return (
        f"log.output={path.parent} is in use by {who}, which is still alive (it holds "
        f"{path.name}). Wait for its end or stop it, or give this run a log.output of its own."
    )
