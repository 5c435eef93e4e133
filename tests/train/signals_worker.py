"""Two ranks train again and again; rank 0 sends signals while they do."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega import session
from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.session import Training, World, open_world
from ghostvis_mega.train.observers.build import Observers
from ghostvis_mega.train.signals import StopRequest
from tests.launch import write_result

STEPS, SIGNALLED_AFTER = 4, 2
BOTH = (0, 1)

DELIVERIES: dict[str, Callable[[list[int]], None]] = {
    "one rank": lambda pids: os.kill(pids[1], signal.SIGTERM),
    "all ranks": lambda pids: [os.kill(pids[rank], signal.SIGUSR1) for rank in BOTH],
    # Everything that a rank has started is in its group.
    "process groups": lambda pids: [os.killpg(os.getpgid(pids[r]), signal.SIGTERM) for r in BOTH],
}


class Sender:
    """An observer that sends what a case says after `SIGNALLED_AFTER` steps."""

    def __init__(self, send: Callable[[], object]):
        self.send = send

    def on_step(self, m: Any) -> None:
        if m.step == SIGNALLED_AFTER:
            self.send()

    def on_start(self, run: Any) -> None: ...
    def on_end(self, summary: Any) -> None: ...


def train(
    config: str, output: Path, world: World, *, workers: int, send: Callable[[], object]
) -> dict[str, Any]:
    """One start of a run: what this rank knows at its end."""
    overrides = [f"log.output={output}", f"train.steps={STEPS}", f"data.num_workers={workers}"]
    stop = StopRequest.on_signals()
    honest = session.make_observers

    def observers(log: Any, *, rank: int, **options: Any) -> Observers:
        made = honest(log, rank=rank, **options)
        return Observers((*made.members, Sender(send))) if rank == 0 else made

    session.make_observers = observers
    before = world.watchdog.progress._moved
    try:
        summary = Training(load_run_config(config, overrides), world, stop=stop).execute()
    finally:
        session.make_observers = honest
    return {
        "status": summary["status"],
        "asked": stop.asked,
        "agreed": stop.agreed,
        # The watchdog of this process is told of what saves and restores move.
        "moved": world.watchdog.progress._moved > before,
    }


def left(output: Path) -> dict[str, Any]:
    """What a run has left on the disk: steps with losses, the newest checkpoint's digests."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    newest = max((output / "checkpoints").glob("step-*"))
    files = {name: file.sha256 for name, file in read_manifest(newest).files.items()}
    return {"losses": [[r["step"], r["loss"]] for r in rows], "at": newest.name, "files": files}


def main() -> None:
    config, folder = sys.argv[1], Path(os.environ["LAUNCH_FOLDER"])
    run = load_run_config(config)
    results: dict[str, Any] = {}
    with open_world(run, device=torch.device("cpu")) as world:
        pids: list[Any] = [None, None]
        dist.all_gather_object(pids, os.getpid())

        def start(name: str, workers: int, send: Callable[[], object]) -> None:
            output = folder / name.replace(" ", "-")
            mine = train(config, output, world, workers=workers, send=send)
            both: list[Any] = [None, None]
            dist.all_gather_object(both, mine)
            if world.groups.rank == 0:
                results.setdefault(name, []).append({"ranks": both, **left(output)})
            dist.barrier()

        start("nobody", 0, lambda: None)
        for delivery, deliver in DELIVERIES.items():
            for workers in (0, 2):
                name = f"{delivery}, {workers} workers"
                start(name, workers, lambda deliver=deliver: deliver(pids))
                start(name, workers, lambda: None)
    if int(os.environ["RANK"]) == 0:
        write_result(results)


if __name__ == "__main__":
    main()
