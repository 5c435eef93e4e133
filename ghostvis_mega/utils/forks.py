"""Ranks forked from a process that has imported everything already: tens of milliseconds each.

The parent must have no process group and no threads that the children would miss. A child finds its
place in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under a launcher.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghostvis_mega.utils.launch import free_port

_POLL_S = 0.005


class ForkedRanks:
    """Some ranks that run one function; use it in a `with` statement, at whose end none is left.

    Args:
        action: Called with the rank; what it returns (JSON) goes to `wait`.
        ranks: Their number.
        folder: Exists; takes their output and results.
    """

    def __init__(self, action: Callable[[int], Any], *, ranks: int, folder: Path):
        self.folder, self.ended = folder, dict[int, int]()
        port = str(free_port())
        self.pids: list[int] = []
        for rank in range(ranks):
            for path in (self._result(rank), self._output(rank)):
                path.unlink(missing_ok=True)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                self._be(rank, ranks, port, action)
            self.pids.append(pid)

    def __enter__(self) -> "ForkedRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _be(self, rank: int, ranks: int, port: str, action: Callable[[int], Any]) -> None:
        """The child; does not return."""
        code = 1
        try:
            descriptor = os.open(self._output(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            result = action(rank)
            self._result(rank).write_text(json.dumps(result))
            code = 0
        finally:
            # Also after SystemExit and the like: nothing of the parent's may run on here.
            if code:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL these ranks (all by default) at once, and wait for them."""
        chosen = range(len(self.pids)) if ranks is None else ranks
        running = [rank for rank in chosen if rank not in self.ended]
        for rank in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)
        for rank in running:
            self.ended[rank] = os.waitstatus_to_exitcode(os.waitpid(self.pids[rank], 0)[1])

    def poll(self) -> bool:
        """Whether all ranks have ended; `ended` has their exit codes."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.ended[rank] = os.waitstatus_to_exitcode(status)
        return len(self.ended) == len(self.pids)

    def wait(self, timeout_s: float) -> list[Any]:
        """What each rank returned.

        Raises:
            RuntimeError: A rank failed, or time is up; holds the rank's output.
        """
        end = time.monotonic() + timeout_s
        while not self.poll():
            failed = [rank for rank, code in self.ended.items() if code]
            if failed or time.monotonic() > end:
                time.sleep(0.2)  # let the others report what they have
                break
            time.sleep(_POLL_S)
        finished = self.poll()
        bad = [rank for rank in range(len(self.pids)) if self.ended.get(rank) != 0]
        if bad:
            outputs = [f"rank {rank}:\n{self.output(rank)[-4000:]}" for rank in bad]
            reason = "failed" if finished else f"failed or did not end within {timeout_s:g} s"
            raise RuntimeError(f"ranks {bad} {reason}\n" + "\n".join(outputs))
        return [json.loads(self._result(rank).read_text()) for rank in range(len(self.pids))]

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        path = self._output(rank)
        return path.read_text(errors="replace") if path.exists() else ""

    def _output(self, rank: int) -> Path:
        return self.folder / f"fork{rank}.txt"

    def _result(self, rank: int) -> Path:
        return self.folder / f"fork{rank}.json"


def run_forked(
    action: Callable[[int], Any], *, ranks: int, folder: Path, timeout_s: float
) -> list[Any]:
    """Run `action` on forked ranks and return what they return; see `ForkedRanks`."""
    with ForkedRanks(action, ranks=ranks, folder=folder) as forked:
        return forked.wait(timeout_s)
