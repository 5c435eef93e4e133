"""What turned out damaged while training: one line each, and a limit that stops the run.

The file of these lines is the memory of the run: all ranks and all resumed processes count what it
holds, so the limit is one for the whole run. A checkpoint keeps the number as well, in case that a
run goes on without the file.
"""

import errno
import json
import logging
import os
import threading
from pathlib import Path

from ghostvis_mega.utils.errors import DataError

log = logging.getLogger(__name__)

LEDGER = "rejected_at_run_time.jsonl"
ALWAYS_ALLOWED = 10
_SHOWN = 20


class BadSamples:
    """Counts damaged samples and images of a run, each once; safe to call from threads.

    Args:
        path: lines are appended here, also by other processes, and read; None writes nothing.
        budget: share of samples that may be damaged.
        num_samples: of all datasets.
        rank: of this process; noted in each line.
        data: identity of the datasets, noted in each line; lines of others do not count.
    """

    def __init__(
        self, path: Path | None, *, budget: float, num_samples: int, rank: int, data: str = ""
    ):
        self._path, self._rank, self._data = path, rank, data
        self.limit = max(ALWAYS_ALLOWED, int(budget * num_samples))
        self._found: dict[tuple[str, int], str] = {}
        self._unlisted = 0
        self._bytes_read = 0
        self._lost = False
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Distinct damaged samples and images of the run so far."""
        with self._lock:
            self._read_lines()
            return self._count

    @property
    def _count(self) -> int:
        return len(self._found) + self._unlisted

    def resume(self, count: int) -> None:
        """Go on with a run that had found `count` when its checkpoint was made.

        Raises:
            DataError: the run has already found more than `limit`.
        """
        with self._lock:
            self._read_lines()
            self._unlisted = max(0, count - len(self._found))
            self._check()

    def note(self, kind: str, number: int, *, key: str, problem: str) -> None:
        """Remember a damaged `sample` or `image` (the kind) by its number.

        Raises:
            DataError: the run has found more than `limit`; lists them.
        """
        with self._lock:
            self._read_lines()
            if (kind, number) not in self._found:
                self._found[kind, number] = key
                line = {"kind": kind, kind: number, "key": key, "rank": self._rank, "why": problem}
                self._append({**line, "data": self._data})
            self._check()

    def _check(self) -> None:
        if self._count <= self.limit:
            return
        shown = ", ".join(
            f"{kind} {number} ({key})" if key else f"{kind} {number}"
            for (kind, number), key in list(self._found.items())[-_SHOWN:]
        )
        place = "" if self._path is None else f", all listed in {self._path}"
        raise DataError(
            f"{self._count} damaged samples or images, more than data.bad_sample_budget allows "
            f"({self.limit}){place}: {shown}. Run `python -m tools.preprocess verify` and copy or "
            "ingest the dataset again, then remove that list; or raise the budget."
        )

    def _read_lines(self) -> None:
        """Take over what other ranks, and processes before this one, have noted since."""
        if self._path is None or not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            file.seek(self._bytes_read)
            whole = file.read().rpartition(b"\n")[0]
        for line in filter(None, whole.splitlines()):
            try:
                row = json.loads(line)
                kind, data = row["kind"], row.get("data", self._data)
                number, key = int(row[kind]), str(row["key"])
            except (ValueError, KeyError, TypeError, AttributeError):
                log.warning("%s holds a line that is not ours: %.80r", self._path, line)
                continue
            if data == self._data:
                self._found.setdefault((kind, number), key)
        self._bytes_read += len(whole) + 1 if whole else 0

    def _append(self, row: dict[str, object]) -> None:
        """One write to a file opened for appending: lines of several processes stay whole.

        Where it cannot be written, this process alone counts the sample; a warning, once.
        """
        if self._path is None:
            return
        line = (json.dumps(row, sort_keys=True) + "\n").encode()
        if self._lost:
            line = b"\n" + line  # the one before may be torn
        try:
            _append(self._path, line)
        except OSError as error:
            if not self._lost:
                log.warning(
                    "%s cannot be written: %s. Training goes on; it does not list all damage",
                    self._path, error.strerror or error,
                )  # fmt: skip
            self._lost = True


def _append(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
