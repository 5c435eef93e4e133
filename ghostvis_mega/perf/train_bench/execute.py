"""One rank of one row: build what trains, time it, and write down what came out."""

import logging
import time
from collections.abc import Callable

import torch

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.train_bench.launches import Order
from ghostvis_mega.perf.train_bench.ours import OurTrainer
from ghostvis_mega.perf.train_bench.results import RowResult
from ghostvis_mega.perf.train_bench.rows import OURS
from ghostvis_mega.perf.train_bench.trace import traced_step
from ghostvis_mega.perf.train_bench.trainer import Trainer, measure, synchronize
from ghostvis_mega.train.watchdog import Watchdog
from ghostvis_mega.utils.hardware import cpu_name
from ghostvis_mega.utils.processes import process_started

log = logging.getLogger(__name__)


def build_trainer(
    kind: str, run: RunConfig, groups: Groups, *, device: torch.device, watchdog: Watchdog
) -> Trainer:
    """What trains in a row of this kind; collective."""
    # Peers' libraries are imported by their own rows only: Liger, for one, changes transformers.
    if kind == OURS:
        return OurTrainer(run, groups, device=device, watchdog=watchdog)
    if kind.startswith("megatron"):
        from ghostvis_mega.perf.train_bench.megatron_peer import MegatronTrainer

        return MegatronTrainer(run, groups, device=device, fused_wgrad=kind.endswith("wgrad"))
    if kind.startswith("hf"):
        from ghostvis_mega.perf.train_bench.hf_peer import HFTrainer

        return HFTrainer(run, groups, device=device, liger=kind.endswith("liger"))
    from ghostvis_mega.perf.train_bench.naive_peer import NaiveTrainer

    return NaiveTrainer(run, groups, device=device)


def execute(order: Order, groups: Groups, *, device: torch.device, watchdog: Watchdog) -> None:
    """Time the row of `order`; collective. The first rank writes the result."""
    alive: Callable[[str], None] = watchdog.alive
    name = order.row.name
    log.info("%s: libraries and process group up in %.1f s", name, time.time() - process_started())
    alive(f"building {name}")
    began = time.perf_counter()
    trainer = build_trainer(order.row.kind, order.run, groups, device=device, watchdog=watchdog)
    synchronize(device)
    log.info("%s: built in %.1f s", name, time.perf_counter() - began)
    steps = order.warm_up + order.steps
    measurement = measure(trainer, steps=steps, device=device, progress=alive)
    trace = []
    if order.trace is not None:
        alive("the traced step")
        trace = traced_step(
            trainer, step=steps, folder=order.trace, name=order.row.name, device=device
        )
    trainer.close()
    if groups.rank != 0:
        return
    on_gpu = device.type == "cuda"
    description, device_bytes = dict(trainer.description), None
    if on_gpu:
        device_bytes = torch.cuda.get_device_properties(device).total_memory
        # Each freed what was cached and asked the driver anew, which stops the GPU.
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        description["allocator retries"] = str(retries)
    result = RowResult(
        name=name,
        kind=order.row.kind,
        processes=len(groups.places),
        warm_up=order.warm_up,
        steps=measurement.steps,
        allocated_bytes=measurement.allocated_bytes,
        reserved_bytes=measurement.reserved_bytes,
        device_bytes=device_bytes,
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        on_gpu=on_gpu,
        fp8=order.run.train.fp8 != "none",
        description=description,
        trace=trace,
    )
    result.write(order.result)
    log.info("%s: measured", name)
