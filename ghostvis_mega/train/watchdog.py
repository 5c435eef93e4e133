"""Finding a hang: a step that does not end kills its process, with a name and the Python stacks."""

import faulthandler
import logging
import os
import threading
import time

log = logging.getLogger(__name__)

EXIT_CODE = 70


class Watchdog:
    """Ends this process when nothing was reported for `timeout_s`.

    A rank that waits in a collective cannot be interrupted in any other way.

    Args:
        timeout_s: Longest silence.
        rank: Named in the message.
    """

    def __init__(self, *, timeout_s: float, rank: int):
        self.timeout_s, self.rank = timeout_s, rank
        self._doing, self._since = "starting", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def alive(self, doing: str) -> None:
        """Report progress and what comes next, such as `step 12`."""
        self._doing, self._since = doing, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout_s / 4)):
            silent = time.monotonic() - self._since
            if silent > self.timeout_s:
                log.critical(
                    "rank %d hangs in %s: no progress for %.0f s (train.timeout_s). "
                    "Stacks of its threads follow.",
                    self.rank,
                    self._doing,
                    silent,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_CODE)
