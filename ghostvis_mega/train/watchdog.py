"""Finding a hang: a step that does not end ends the process, with a report over all ranks."""

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path

from ghostvis_mega.parallel.calls import CallWatch
from ghostvis_mega.train.hang import gather, leave_state, own_state, present
from ghostvis_mega.train.progress import Progress

log = logging.getLogger(__name__)

EXIT_CODE = 70
GATHER_S = 2.0
"""How long ranks wait for the states of the others."""
_POLL_S = 1.0


class Watchdog:
    """Ends this process when nothing was reported for `timeout_s`, or when another rank says so.

    A rank that waits in a collective cannot be interrupted in any other way.

    Args:
        timeout_s: Longest silence.
        rank: Named in the message.
        world_size: Ranks that take part in the report.
        folder: Where they exchange their states: one that is new with each launch. None: this
            process is looked at alone.
        calls: Of this process to others.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        rank: int,
        world_size: int = 1,
        folder: Path | None = None,
        calls: CallWatch | None = None,
    ):
        self.timeout_s, self.rank, self.world_size = timeout_s, rank, world_size
        self.folder, self.calls = folder, calls
        self._doing, self._since = "starting", time.monotonic()
        self.progress = Progress(alive=self.alive)
        """Of saves and restores; while it is shown and grows, this process is alive."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def alive(self, doing: str | None = None) -> None:
        """Report progress and what comes next, such as `step 12`; None: more of the same."""
        self._doing, self._since = doing or self._doing, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(_POLL_S, self.timeout_s / 4)):
            silent = time.monotonic() - self._since
            if silent > self.timeout_s:
                log.critical(
                    "rank %d hangs in %s: no progress for %.0f s (train.timeout_s)",
                    self.rank,
                    self._doing,
                    silent,
                )
                self._end(silent)
            elif self.folder is not None and self.folder.is_dir() and present(self.folder):
                self._end(silent)

    def _end(self, silent_s: float) -> None:
        """Leave what explains the hang and end this process."""
        try:
            if self.folder is None:
                faulthandler.dump_traceback(all_threads=True)
                return
            state = own_state(
                self.rank,
                doing=self._doing,
                silent_s=silent_s,
                calls=self.calls,
                save=self.progress.awaited,
            )
            leave_state(self.folder, state)
            report = gather(self.folder, self.rank, self.world_size, wait_s=GATHER_S)
            if report is not None:
                log.critical("%s\nthe whole report is in %s", report, self.folder)
        except OSError as error:
            log.critical("the hang cannot be reported: %s", error)
        finally:
            # Whatever went wrong with the report: a rank that hangs must not stay.
            os._exit(EXIT_CODE)
