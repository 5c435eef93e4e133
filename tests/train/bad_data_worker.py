"""Trains on damaged data and notes what it trained on.

In the first launch rank 1 is killed while it reads ahead; in the second a shard is cut once all
ranks have opened it.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.engine.step import StepInput, StepResult, TrainEngine
from ghostvis_mega.session import Training, open_world
from ghostvis_mega.train.feed import Feed

KILL_AT = 13


def trained_on(work: StepInput) -> list[tuple[int, float]]:
    """(sample, sum of its loss weights) in the order of a rank's packs."""
    found = []
    for micro in work.micro_batches:
        assert micro.cu_seqlens is not None
        for place, sample in enumerate(micro.sample_ids):
            part = slice(int(micro.cu_seqlens[place]), int(micro.cu_seqlens[place + 1]))
            found.append((sample, float(micro.weights_BS[0, part].sum())))
    return found


def main() -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder, which = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    honest_step, honest_read, honest_check = TrainEngine.step, Feed._read, Feed.check_state

    def step(engine: TrainEngine, work: StepInput, *, step: int, **keywords: Any) -> StepResult:
        with open(folder / f"{which}{rank}.jsonl", "a") as file:
            file.write(json.dumps([step, work.trained_tokens, trained_on(work)]) + "\n")
        return honest_step(engine, work, step=step, **keywords)

    def read(feed: Feed, step: int) -> Any:
        if which == "first" and rank == 1 and step == KILL_AT:
            (folder / "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return honest_read(feed, step)

    def check_state(feed: Feed, state: dict[str, Any], *, step: int) -> None:
        honest_check(feed, state, step=step)
        if rank == 0:
            shard, size = json.loads((folder / "cut.json").read_text())
            os.truncate(shard, size)
        dist.barrier()

    run = load_run_config(folder / "run.yaml", [])
    with (
        mock.patch.object(TrainEngine, "step", step),
        mock.patch.object(Feed, "_read", read),
        mock.patch.object(Feed, "check_state", check_state),
        open_world(run, device=torch.device("cpu")) as world,
    ):
        Training(run, world).execute()


if __name__ == "__main__":
    main()
