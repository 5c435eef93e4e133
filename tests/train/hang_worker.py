"""Ranks of which rank 1 stops answering, or stays behind in its own work."""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.parallel.calls import CallWatch
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.watchdog import Watchdog

TIMEOUT_S = 10.0
HANGS_AT = 3
FOLDER = Path(os.environ["LAUNCH_FOLDER"])


def mark() -> None:
    """Note when the hang begins."""
    (FOLDER / "began").write_text(repr(time.time()))


def reads_for_ever() -> None:
    threading.Event().wait()


def stopped_in_training() -> None:
    """A real run, whose rank 1 is stopped as by a debugger or a frozen node."""
    from ghostvis_mega.perf.stress_data import write_datasets
    from ghostvis_mega.perf.stress_layouts import (
        LAYOUTS,
        StressJob,
        settings_of,
        write_deepspeed_files,
    )
    from ghostvis_mega.session import Training, open_world

    job = StressJob(FOLDER / "job", LAYOUTS[:1], steps=20, seed=3, step_timeout_s=240)
    run = settings_of(LAYOUTS[0], job, steps=20, cuda=False)
    with open_world(run, device=torch.device("cpu")) as world:
        if world.groups.rank == 0:
            write_datasets(job.folder / "data")
            write_deepspeed_files(job)
        dist.barrier()
        honest = Feed.get

        def get(feed: Feed, step: int) -> Any:
            # Building and the first steps may take long on a busy machine.
            world.watchdog.timeout_s = TIMEOUT_S if step >= HANGS_AT else 240.0
            if step == HANGS_AT and world.groups.rank == 1:
                mark()
                os.kill(os.getpid(), signal.SIGSTOP)
            return honest(feed, step)

        with mock.patch.object(Feed, "get", get):
            Training(run, world).execute()


def stuck_in_its_own_work() -> None:
    """Three ranks; rank 1 reads for ever, rank 2 waits for it, and rank 0 waits for rank 2."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair = dist.new_group([1, 2], group_desc="pair")
    with CallWatch() as calls:
        watchdog = Watchdog(
            timeout_s=TIMEOUT_S, rank=rank, world_size=3, folder=FOLDER / "hangs", calls=calls
        )
        for step in range(5):
            watchdog.alive(f"step {step}")
            numbers = torch.zeros(4)
            if rank == 1 and step == HANGS_AT:
                mark()
                reads_for_ever()
            if rank > 0:
                dist.all_reduce(numbers, group=pair)
            dist.all_reduce(numbers)


def main() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    {"stopped": stopped_in_training, "stuck": stuck_in_its_own_work}[sys.argv[1]]()


if __name__ == "__main__":
    main()
