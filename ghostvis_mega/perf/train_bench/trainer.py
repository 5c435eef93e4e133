"""The loop that times a row, whatever trains in it."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ghostvis_mega.perf.train_bench.results import StepRecord

log = logging.getLogger(__name__)


class Trainer(Protocol):
    """What a row trains with; all calls are collective."""

    description: dict[str, str]
    """What it runs with: layers, optimizer, kernels."""

    def step(self, step: int) -> StepRecord:
        """Train on the batch of `step`, counted from 0; the device may still be busy when it
        returns."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the steps of a row came to, over all ranks."""

    steps: list[StepRecord]
    allocated_bytes: int | None
    reserved_bytes: int | None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    trainer: Trainer,
    *,
    steps: int,
    device: torch.device,
    progress: Callable[[str], None],
) -> Measurement:
    """Train `steps` steps, one after the other without a pause; collective.

    Each step's time is that of the slowest rank, from the end of the step before to its own, so
    nothing between steps is lost. Memory is the most that any rank held, from the first step on.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    records = []
    dist.barrier()
    began = time.perf_counter()
    for step in range(steps):
        progress(f"step {step + 1}")
        record = trainer.step(step)
        synchronize(device)
        ended = time.perf_counter()
        records.append(dataclasses.replace(record, seconds=ended - began))
        if step == 0:
            log.info("first step: %.1f s, loss %.3f", records[0].seconds, records[0].loss)
        began = ended
    memory = (0, 0)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    times = [(record.seconds, record.data_s) for record in records]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (times, memory))
    slowest = [
        dataclasses.replace(
            record,
            seconds=max(times[number][0] for times, _ in gathered),
            data_s=max(times[number][1] for times, _ in gathered),
        )
        for number, record in enumerate(records)
    ]
    allocated, reserved = (max(memory[place] for _, memory in gathered) for place in (0, 1))
    on_gpu = device.type == "cuda"
    return Measurement(slowest, allocated if on_gpu else None, reserved if on_gpu else None)


def trace_file(folder: Path, name: str, rank: int) -> Path:
    """Where the trace of a rank of a row goes."""
    kept = "".join(c if c.isalnum() else "-" for c in name).strip("-")
    return folder / f"{kept}-rank{rank}.json.gz"
