"""Where the time of a step goes, on CPU and GPU alike."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch.profiler import record_function

SECTION = "section: "
"""What the names of sections begin with in a profiler's trace."""
_Place = tuple[str, bool]
"""Section, and whether it is what that section waited for other ranks."""


class SectionTimer:
    """Adds up the time of named sections; on CUDA by events, so that nothing waits for the GPU.

    Args:
        device: Where the timed work runs.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._events: list[tuple[_Place, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[_Place, float] = {}
        self._section, self._waiting = "", False
        self.waits: dict[str, float] = {}
        """What the sections of the last read waited for other ranks, as far as it was timed."""

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time the block under `name`; blocks of one name add up."""
        outer, self._section = self._section, name
        # A profiler shows the section by its name; without one this costs a microsecond.
        with record_function(SECTION + name), self._timed((name, False)):
            yield
        self._section = outer

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the block as a wait of the section that is open; one inside another is part of
        it."""
        if self._waiting:
            yield
            return
        self._waiting = True
        with self._timed((self._section, True)):
            yield
        self._waiting = False

    @contextlib.contextmanager
    def _timed(self, place: _Place) -> Iterator[None]:
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((place, start, end))
            return
        begin = time.perf_counter()
        yield
        self._add(place, time.perf_counter() - begin)

    def _add(self, place: _Place, seconds: float) -> None:
        self._seconds[place] = self._seconds.get(place, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds by section since the last read; on CUDA waits for the last event."""
        for place, start, end in self._events:
            end.synchronize()
            self._add(place, start.elapsed_time(end) / 1000)
        self._events.clear()
        seconds, self._seconds = self._seconds, {}
        self.waits = {name: value for (name, waits), value in seconds.items() if waits}
        return {name: value for (name, waits), value in seconds.items() if not waits}
