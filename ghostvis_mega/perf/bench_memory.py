"""Peak GPU memory and step time of a run under different ways to save memory."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.groups import build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.utils.figures import Figure, at_most, measured
from ghostvis_mega.utils.timing import SectionTimer

GIB = 1024**3
_CLEAN_GIB = 0.25
"""A mode that starts with more allocated than this would measure another one's leftovers."""

_SECTIONS = ("vision", "exchange", "llm", "optimizer")
_BETWEEN = "reductions"
"""What a step does outside its timed sections."""


@dataclass(frozen=True)
class Mode:
    """One way to run, by the settings that differ."""

    name: str
    run: RunConfig


class SectionPeaks(SectionTimer):
    """Most bytes allocated in each section of a step, in place of its time.

    Counted by PyTorch's allocator on the host, so nothing waits for the GPU.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.bytes = dict.fromkeys((*_SECTIONS, _BETWEEN), 0)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Attribute the peak inside to `name`, and what came before to the code between."""
        self.take(_BETWEEN)
        yield
        self.take(name)

    def take(self, name: str) -> None:
        """Raise the peak of `name` to the most since the last call."""
        self.bytes[name] = max(self.bytes[name], torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()


def measure_memory(
    modes: Sequence[Mode],
    *,
    device: torch.device,
    steps: int,
    progress: Callable[[str], None],
) -> list[Figure]:
    """Rows of name, value, unit, bar and ok for each mode, one after the other; collective.

    Peaks are PyTorch's allocated bytes on the rank that holds most; what CUDA and NCCL take beside
    it (one to two GiB) is not in them. Sections of a step have peaks of their own, since the
    largest hides what a mode saves in the others. Time is that of the fastest step after the
    first. On one GPU a mode that does not fit is a row like others.

    Args:
        modes: What to run.
        device: A GPU.
        steps: Of each mode, at least 2.
        progress: Told before each mode what is being done.
    """
    rows = []
    for mode in modes:
        progress(f"memory of {mode.name}")
        destroy_groups()
        gc.collect()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated(device) / GIB
        if left > _CLEAN_GIB:
            name = f"{mode.name}: left behind by the modes before, so measure it alone"
            rows.append(at_most(name, left, "GiB", _CLEAN_GIB))
            continue
        try:
            figures = _run(mode.run, device=device, steps=steps, progress=progress)
        except torch.cuda.OutOfMemoryError:
            if dist.get_world_size() > 1:
                raise  # the other ranks wait in a collective
            total = torch.cuda.get_device_properties(device).total_memory
            figures = [("does not fit into", total / GIB, "GiB")]
        rows += [measured(f"{mode.name}: {name}", value, unit) for name, value, unit in figures]
    return rows


def _run(
    run: RunConfig, *, device: torch.device, steps: int, progress: Callable[[str], None]
) -> list[tuple[str, float, str]]:
    groups = build_groups(Degrees.of(run, world_size=dist.get_world_size()), seed=run.train.seed)
    feed = Feed(run, groups, Dataset.open(run.data.train))
    engine = TrainEngine(run, groups, device=device)
    held = torch.cuda.memory_allocated(device)
    engine.timer = peaks = SectionPeaks(device)
    torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], float("nan")
    try:
        for step in range(steps):
            progress(f"step {step + 1}")
            _, work = feed.get(step)
            torch.cuda.synchronize(device)
            started = time.monotonic()
            loss = engine.step(work, step=step).loss
            torch.cuda.synchronize(device)
            seconds.append(time.monotonic() - started)
    finally:
        # Also when memory is out: the next mode needs it.
        feed.close()
        engine.close()
    totals = torch.tensor([held, *peaks.bytes.values()], dtype=torch.float64, device=device)
    dist.all_reduce(totals, op=dist.ReduceOp.MAX)
    held, *highest = (total / GIB for total in totals.tolist())
    return [
        ("model and optimizer before the first step", held, "GiB"),
        ("peak", max(highest), "GiB"),
        *((f"peak, {part}", peak, "GiB") for part, peak in zip(peaks.bytes, highest, strict=True)),
        ("fastest step", min(seconds[1:]), "s"),
        ("loss of the last step", loss, "nats"),
    ]
