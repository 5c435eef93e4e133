"""One step under PyTorch's profiler: a trace for a viewer, and where the time went."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ghostvis_mega.perf.train_bench.kernel_kinds import COMPUTE, KINDS, kind_of
from ghostvis_mega.perf.train_bench.trace_reading import (
    STEP,
    Section,
    StepTrace,
    read_step,
)
from ghostvis_mega.perf.train_bench.trainer import Trainer, synchronize, trace_file

TOP = 8
"""Kernels that are named one by one."""
_SHOWN_CHARACTERS = 60
_SHARE = "% of the step"
GAPS: tuple[tuple[float, str], ...] = (
    (5, "below 5 us"),
    (20, "5 to 20 us"),
    (100, "20 to 100 us"),
    (1000, "100 us to 1 ms"),
    (float("inf"), "1 ms and more"),
)
"""Upper bounds of gaps between kernels. The shortest are the GPU's own; long ones mean that it
waits for the CPU."""
START, END, OUTSIDE = "before the first kernel", "end of step", "outside of named parts"


def gaps_us(trace: StepTrace) -> Iterator[float]:
    """Times in which nothing ran on any stream, from the start of the step to its end."""
    until = trace.start_us
    for span in sorted(trace.spans, key=lambda s: s.start_us):
        if span.start_us > until:
            yield span.start_us - until
        until = max(until, span.end_us)
    if trace.end_us > until:
        yield trace.end_us - until


def phases_us(trace: StepTrace) -> dict[str, float]:
    """The step cut by what was under way on the GPU; the parts add up to the step.

    A kernel belongs to the named part in which the CPU asked for it, on whatever thread, and with
    it the gap before it. All that follows the last matrix product or attention is `END`: the rest
    of the reductions, norm and optimizer.
    """
    spans = sorted(trace.spans, key=lambda s: s.start_us)
    if not spans:
        return {START: trace.step_us}
    compute_end = max((s.end_us for s in spans if kind_of(s.name) in COMPUTE), default=0.0)
    part_of = _Parts(trace.sections)
    phases: Counter[str] = Counter()
    phases[START] = until = max(spans[0].start_us, trace.start_us)
    phases[START] -= trace.start_us
    for span in spans:
        ended = max(until, min(span.end_us, trace.end_us))
        late = span.start_us >= compute_end
        phases[END if late else part_of(span.launch_us or span.start_us)] += ended - until
        until = ended
    phases[END] += trace.end_us - until
    return dict(phases)


class _Parts:
    """Names the innermost section at a time of the CPU."""

    def __init__(self, sections: Sequence[Section]):
        self._sections = sorted(sections, key=lambda s: s.start_us)
        self._starts = [section.start_us for section in self._sections]

    def __call__(self, at_us: float) -> str:
        place = bisect_right(self._starts, at_us)
        for section in reversed(self._sections[:place]):
            if section.end_us >= at_us:
                return section.name
        return OUTSIDE


def trace_figures(trace: StepTrace, *, on_gpu: bool) -> list[dict[str, Any]]:
    """Name, value and unit: share of the step by kind and, on a GPU, by part of the step, idle
    share by length of the gap, and number of kernels; and the kernels that took most.

    Kinds may add up to more than the step where kernels of several streams overlap.
    """
    step_us = trace.step_us
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for span in trace.spans:
        kinds[kind_of(span.name)] += span.own_us
        names[span.name] += span.own_us

    def share(name: str, part_us: float) -> dict[str, Any]:
        return {"name": name, "value": 100 * part_us / step_us, "unit": _SHARE}

    figures: list[dict[str, Any]] = [{"name": "step", "value": step_us / 1e6, "unit": "s"}]
    figures += [share(kind, kinds[kind]) for kind in KINDS]
    if on_gpu:
        figures += [share(f"phase: {name}", part) for name, part in phases_us(trace).items()]
        figures += _idle_figures(trace)
        kernels = float(len(trace.spans))
        figures.append({"name": "kernels, copies and fills", "value": kernels, "unit": ""})
    for name, own_us in names.most_common(TOP):
        short = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."
        figures.append(share(f"kernel {short}", own_us))
    return figures


def _idle_figures(trace: StepTrace) -> list[dict[str, Any]]:
    """All idle time, and how much of it lies in gaps of each length."""
    idle = {name: 0.0 for _, name in GAPS}
    for gap in gaps_us(trace):
        idle[next(name for bound, name in GAPS if gap < bound)] += gap
    parts = {"GPU idle": sum(idle.values())} | {
        f"GPU idle, gaps {name}": part for name, part in idle.items()
    }
    return [
        {"name": name, "value": 100 * part / trace.step_us, "unit": _SHARE}
        for name, part in parts.items()
    ]


def traced_step(
    trainer: Trainer, *, step: int, folder: Path, name: str, device: torch.device
) -> list[dict[str, Any]]:
    """Train one step under the profiler; collective. Each rank writes a Chrome trace; returns the
    figures of the first, none on others.

    The profiler makes a step longer, above all on the CPU: its shares count, not its time.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    folder.mkdir(parents=True, exist_ok=True)
    synchronize(device)
    dist.barrier()
    with profile(activities=activities) as profiler, torch.profiler.record_function(STEP):
        trainer.step(step)
        synchronize(device)
    file = trace_file(folder, name, dist.get_rank())
    profiler.export_chrome_trace(str(file))
    if dist.get_rank() != 0:
        return []
    return trace_figures(read_step(file, on_gpu=on_gpu), on_gpu=on_gpu)
