"""Ranks whose calls are recorded, counted by the profiler as well, and compared; some are wrong."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import deepspeed.comm
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch.distributed import ProcessGroup

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.parallel.trace import CollectiveTrace, group_labels, trace_store
from ghostvis_mega.parallel.trace_calls import TRACED
from ghostvis_mega.parallel.trace_compare import TraceMismatch
from ghostvis_mega.perf.stress_data import write_datasets
from ghostvis_mega.perf.stress_layouts import (
    StressJob,
    choose_layouts,
    settings_of,
    write_deepspeed_files,
)
from ghostvis_mega.train.feed import Feed
from tests.launch import write_result

WORLD = 4


def every_kind(rank: int, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
    """Calls of all kinds, by torch, DeepSpeed and Megatron-Core."""
    ones = torch.ones(8)
    dist.all_reduce(ones)
    dist.all_reduce(ones.clone(), op=dist.ReduceOp.MAX, group=data)
    dist.broadcast(ones, 2)
    dist.reduce(ones, 1)
    dist.all_gather([torch.empty(8) for _ in range(WORLD)], ones)
    dist.all_gather_into_tensor(torch.empty(8 * WORLD), ones)
    dist.reduce_scatter_tensor(torch.empty(2), ones.clone())
    # Rank r sends r + k rows of two to rank k, so no two parts of the matrix are alike.
    rows_out, rows_in = [rank + k for k in range(WORLD)], [k + rank for k in range(WORLD)]
    given = torch.ones(sum(rows_out), 2)
    dist.all_to_all_single(torch.empty(sum(rows_in), 2), given, rows_in, rows_out)
    dist.all_to_all_single(torch.empty(8), ones)
    dist.barrier()
    gathered = [None] * WORLD
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * 10})
    dist.broadcast_object_list([rank], src=0)
    peer = rank ^ 1
    if rank % 2:
        dist.recv(ones, peer)
        dist.isend(ones, peer).wait()
    else:
        dist.send(ones, peer)
        dist.irecv(ones, peer).wait()
    swaps = [dist.P2POp(dist.isend, ones, peer), dist.P2POp(dist.irecv, torch.empty(8), peer)]
    for work in dist.batch_isend_irecv(swaps):
        work.wait()
    deepspeed.comm.all_reduce(torch.ones(3), group=data)
    deepspeed.comm.allgather_fn(torch.empty(3 * data.size()), torch.ones(3), group=data)
    deepspeed.comm.reduce_scatter_fn(torch.empty(2), torch.ones(2 * data.size()), group=data)
    part = torch.ones(4, 2, requires_grad=True)
    whole = mappings.gather_from_sequence_parallel_region(part, group=tensor)
    mappings.reduce_from_tensor_model_parallel_region(whole, group=tensor).sum().backward()


def count_by_profiler(action: Callable[[], None]) -> int:
    """Calls into c10d while `action` runs, as torch's profiler sees them below Python."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return sum(event.name.startswith("c10d::") for event in profile.events())


def count_threads(degrees: Degrees) -> list[int]:
    """Threads of this process before groups are built, while there are some, and after they are
    destroyed; `degrees` twice over."""
    threads = Path("/proc/self/task")
    counts = [len(list(threads.iterdir()))]
    for _ in range(2):
        build_groups(degrees, seed=0)
        counts.append(len(list(threads.iterdir())))
        destroy_groups()
        counts.append(len(list(threads.iterdir())))
    return counts


def count_in_steps(folder: Path) -> dict[str, list[int]]:
    """For some layouts, calls of a training step: traced, and seen by the profiler."""
    layouts = choose_layouts("zero3,tp2-pp2", processes=WORLD)
    job = StressJob(folder=folder, layouts=layouts, steps=1, seed=0, step_timeout_s=60)
    if dist.get_rank() == 0:
        write_datasets(folder / "data")
        write_deepspeed_files(job)
    dist.barrier()
    counts = {}
    for layout in layouts:
        destroy_groups()
        run = settings_of(layout, job, steps=1, cuda=False)
        groups = build_groups(Degrees.of(run, world_size=WORLD), seed=0)
        engine = TrainEngine(run, groups, device=torch.device("cpu"))
        _, work = Feed(run, groups, Dataset.open(run.data.train)).get(0)
        with CollectiveTrace(rank=groups.rank) as trace:
            counted = count_by_profiler(partial(engine.step, work, step=0))
        counts[layout.name] = [trace.num_calls, counted]
        engine.close()
    return counts


def skip(rank: int, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
    """Rank 2 leaves out the second of three all-reduces."""
    for size in (10, 20, 30):
        if not (rank == 2 and size == 20):
            dist.all_reduce(torch.ones(size), group=data, async_op=True)


def bucket(rank: int, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
    """Rank 3 fills its buckets otherwise."""
    for size in (64, 32, 96) if rank == 3 else (64, 64, 64):
        dist.all_reduce(torch.ones(size), group=data, async_op=True)


def swap(rank: int, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
    """Rank 1 takes two groups, each by itself sound, the other way round."""
    groups = [dist.group.WORLD, tensor]
    for group in reversed(groups) if rank == 1 else groups:
        dist.all_reduce(torch.ones(5), group=group, async_op=True)


def swap_in_group(rank: int, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
    """Rank 0 swaps two calls of one group that differ in nothing but the reduction."""
    operations = [dist.ReduceOp.SUM, dist.ReduceOp.MAX]
    for op in reversed(operations) if rank == 0 else operations:
        dist.all_reduce(torch.ones(5), op=op, async_op=True)


def splits(rank: int, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
    """Rank 0 expects more of rank 3 than that sends; nobody else is concerned."""
    received = [1, 1, 1, 2 if rank == 0 else 1]
    dist.all_to_all_single(
        torch.empty(sum(received), 6), torch.ones(4, 6), received, [1] * 4, async_op=True
    )


def message(rank: int, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
    """Rank 1 sends two tensors in the other order than rank 0 expects them."""
    for size in (7, 9):
        if rank == 0:
            dist.irecv(torch.empty(size), 1)
        if rank == 1:
            dist.isend(torch.ones(16 - size), 0)


class Sent:
    """A message that is already delivered."""

    def wait(self) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def nothing_sent() -> Iterator[None]:
    """Calls end at once: gloo would abort the process where two that do not fit meet."""
    with contextlib.ExitStack() as stack:
        for name in TRACED:
            if name in vars(ProcessGroup):
                fake = mock.patch.object(ProcessGroup, name, lambda *_, **__: Sent())
                stack.enter_context(fake)
        yield


WRONG = {f.__name__: f for f in (skip, bucket, swap, swap_in_group, splits, message)}


def main() -> None:
    apply_cpu_shim()
    dist.init_process_group("gloo")
    deepspeed.comm.init_distributed("gloo", verbose=False, dist_init_required=False)
    degrees = Degrees(world_size=WORLD, tensor=2, pipeline=1, virtual_pipeline=1, context=1, data=2)
    store, results = trace_store(), {"threads": count_threads(degrees)}
    groups = build_groups(degrees, seed=0)

    def act() -> None:
        every_kind(groups.rank, groups.data, groups.tensor)

    with CollectiveTrace(rank=groups.rank, labels=group_labels(groups)) as trace:
        counted = count_by_profiler(act)
        results["seen"] = [trace.num_calls, counted]
        record = trace.record()
        results["labels"] = sorted(info.label for info in record.groups.values())
        results["calls"] = [str(call) for call in record.calls]
        trace.check(store, world_size=WORLD, timeout_s=30)
        # Twice in a row, and after more calls: what agreed is forgotten, and no more.
        trace.check(store, world_size=WORLD, timeout_s=30)
        act()
        trace.check(store, world_size=WORLD, timeout_s=30)
    after = trace.num_calls
    act()
    results["after"] = trace.num_calls - after
    dist.barrier()
    for name, wrong in WRONG.items():
        path = Path(os.environ["LAUNCH_FOLDER"]) / f"{name}{groups.rank}.jsonl"
        trace = CollectiveTrace(rank=groups.rank, labels=group_labels(groups), path=path)
        prefix = dist.PrefixStore(name, store)
        with nothing_sent(), trace:
            trace.check(prefix, world_size=WORLD, timeout_s=30)
            wrong(groups.rank, groups.data, groups.tensor)
            try:
                trace.check(prefix, world_size=WORLD, timeout_s=30)
                results[name] = "agreed"
            except TraceMismatch as error:
                results[name] = str(error)
    with CollectiveTrace(rank=groups.rank, keep=4) as trace:
        try:
            if groups.rank != 2:
                trace.check(dist.PrefixStore("absent", store), world_size=WORLD, timeout_s=0.5)
        except TraceMismatch as error:
            results["absent"] = str(error)
    dist.barrier()
    results["steps"] = count_in_steps(Path(os.environ["LAUNCH_FOLDER"]) / "steps")
    if groups.rank == 0:
        write_result(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
