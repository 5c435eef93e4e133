"""What turned out damaged while training: one line each, and a limit that stops the run."""

import json
import os
import threading
from pathlib import Path

from ghostvis_mega.utils.errors import DataError

LEDGER = "rejected_at_run_time.jsonl"
ALWAYS_ALLOWED = 10
_SHOWN = 20


class BadSamples:
    """Counts damaged samples and images of one process, each once; safe to call from threads.

    Args:
        path: lines are appended here, also by other processes; None writes nothing.
        budget: share of samples that may be damaged.
        num_samples: of all datasets.
        rank: of this process; noted in each line.
    """

    def __init__(self, path: Path | None, *, budget: float, num_samples: int, rank: int):
        self._path, self._rank = path, rank
        self.limit = max(ALWAYS_ALLOWED, int(budget * num_samples))
        self._found: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Distinct damaged samples and images so far."""
        return len(self._found)

    def note(self, kind: str, number: int, *, key: str, problem: str) -> None:
        """Remember a damaged `sample` or `image` (the kind) by its number.

        Raises:
            DataError: there are now more than `limit`; lists them.
        """
        with self._lock:
            if (kind, number) in self._found:
                return
            self._found[kind, number] = key
            if self._path is not None:
                self._append(
                    {"kind": kind, kind: number, "key": key, "rank": self._rank, "why": problem}
                )
            if len(self._found) > self.limit:
                shown = ", ".join(
                    f"{kind} {number} ({key})" if key else f"{kind} {number}"
                    for (kind, number), key in list(self._found.items())[-_SHOWN:]
                )
                place = f", all listed in {self._path}" if self._path is not None else ""
                raise DataError(
                    f"{len(self._found)} damaged samples or images, more than data."
                    f"bad_sample_budget allows ({self.limit}){place}: {shown}. Run `python -m "
                    "tools.preprocess verify` and copy or ingest the dataset again."
                )

    def _append(self, row: dict[str, object]) -> None:
        """One write to a file opened for appending: lines of several processes stay whole."""
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(row, sort_keys=True) + "\n").encode())
        finally:
            os.close(descriptor)
