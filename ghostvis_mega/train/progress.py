"""What a save or a restore has moved so far: it tells a slow disk from one that hangs."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

log = logging.getLogger(__name__)

TICK_S = 0.5
"""How often it is looked at while somebody waits."""
_KEY = "ghostvis_mega/moved_bytes"


def _nobody() -> None:
    """Nobody asks."""


class Progress:
    """Bytes that this process has written, read or hashed, and what its save is at.

    A rank whose own disk is done waits for the slowest one's, so what counts as progress is the sum
    over all ranks. It is kept in the store at which they met: a collective would have to be
    joined by ranks that are still at work.

    Args:
        alive: Called from a thread while `shown`, whenever some rank has moved more.
    """

    def __init__(self, *, alive: Callable[[], None] = _nobody):
        self._alive = alive
        self._lock = threading.Lock()
        self._moved = self._told = self._seen = 0
        self._doing, self._awaited = "", False

    def moved(self, num_bytes: int) -> None:
        """So many more; from any thread."""
        with self._lock:
            self._moved += num_bytes

    @contextmanager
    def at(self, doing: str) -> Iterator[None]:
        """What the thread that saves does by itself; outside of this it waits for others."""
        self._doing = doing
        try:
            yield
        finally:
            self._doing = ""

    @property
    def awaited(self) -> str | None:
        """What the save is at that the main thread waits for; empty where it waits for other ranks,
        None where the main thread waits for no save."""
        return self._doing if self._awaited else None

    @contextmanager
    def shown(self, *, awaits_save: bool = False) -> Iterator[None]:
        """As long as bytes move, this takes as long as it takes.

        Args:
            awaits_save: Whether the caller does nothing but wait for the thread that saves.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._look, args=(stop,), name="progress", daemon=True)
        self._awaited = awaits_save
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._awaited = False

    def _look(self, stop: threading.Event) -> None:
        while not stop.wait(TICK_S):
            try:
                total = self._total()
            except dist.DistError as error:
                # Without a word of others nothing counts as progress, and the watchdog decides.
                log.debug("the progress of other ranks is unknown: %s", error)
                return
            if total > self._seen:
                self._seen = total
                self._alive()

    def _total(self) -> int:
        """Bytes that all ranks have told of, this one's added."""
        with self._lock:
            moved = self._moved
        if not dist.is_initialized():
            return moved
        store = dist.distributed_c10d._get_default_store()
        total = store.add(_KEY, moved - self._told)
        self._told = moved
        return total
