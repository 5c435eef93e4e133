"""A step out of the Chrome trace that PyTorch's profiler writes.

Times are microseconds on the clock of the trace, the same for the CPU and the GPU.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_mega.utils.timing import SECTION

STEP = "ghostvis: traced step"
"""What the traced step is called."""
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Span:
    """One kernel, or on a CPU one operator less what it calls."""

    name: str
    start_us: float
    end_us: float
    own_us: float
    launch_us: float | None = None
    """When the CPU asked for it; None on a CPU."""


@dataclass(frozen=True)
class Section:
    """A part of the step that a timer names, as the CPU went through it."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class StepTrace:
    """One step of one rank."""

    start_us: float
    end_us: float
    spans: list[Span]
    sections: list[Section]

    @property
    def step_us(self) -> float:
        """How long it took, the profiler's own work included."""
        return self.end_us - self.start_us


def read_step(path: Path, *, on_gpu: bool) -> StepTrace:
    """The traced step of a file of ours.

    Args:
        path: Chrome trace, compressed.
        on_gpu: Take kernels, copies and fills of the GPU; else the CPU's operators.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    notes = [event for event in events if event.get("cat") == "user_annotation"]
    (whole,) = (note for note in notes if note["name"] == STEP)
    return StepTrace(
        start_us=whole["ts"],
        end_us=whole["ts"] + whole["dur"],
        spans=list(_kernels(events) if on_gpu else _operators(events)),
        sections=[
            Section(note["name"].removeprefix(SECTION), note["ts"], note["ts"] + note["dur"])
            for note in notes
            if note["name"].startswith(SECTION)
        ],
    )


def _kernels(events: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """What ran on the GPU; a launch and its kernel share a correlation number."""
    events = list(events)
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") in _ON_GPU:
            start, took = event["ts"], event["dur"]
            launch = launches.get(event["args"].get("correlation"), start)
            yield Span(event["name"], start, start + took, took, launch)


def _operators(events: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """The CPU's operators, each with its time less that of operators which it calls."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(event)
    for operators in threads.values():
        operators.sort(key=lambda event: (event["ts"], -event["dur"]))
        inner = [0.0] * len(operators)
        open_ones: list[int] = []
        for place, event in enumerate(operators):
            while open_ones and _end(operators[open_ones[-1]]) <= event["ts"]:
                open_ones.pop()
            if open_ones:
                inner[open_ones[-1]] += event["dur"]
            open_ones.append(place)
        for event, called_us in zip(operators, inner, strict=True):
            own = max(0.0, event["dur"] - called_us)
            yield Span(event["name"], event["ts"], _end(event), own)


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]
