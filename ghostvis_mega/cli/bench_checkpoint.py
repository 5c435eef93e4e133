"""`ghostvis bench checkpoint`: how long a save keeps training, and how large it is."""

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from ghostvis_mega.cli.output import (
    EXIT_WRONG_SETTINGS,
    AsJson,
    conclude,
    refusing_settings,
    scratch,
)
from ghostvis_mega.config.sizes import checkpoint_bytes
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.disks import disk_problem
from ghostvis_mega.utils.figures import Figure, at_most, measured
from ghostvis_mega.utils.logging import setup_logging

log = logging.getLogger(__name__)

BENCH_CHECKPOINT_HELP = """Stall, write time and size of a run's checkpoints, saved while it trains.

\b
Examples (a tiny model on a CPU; a 2 B model on one GPU, which takes 56 GB for two checkpoints):
  python -m ghostvis_mega bench checkpoint examples/configs/vlm_tiny_easyvqa.yaml
  python -m ghostvis_mega bench checkpoint examples/configs/vlm_1_5b_easyvqa.yaml --out /data

\b
The stall is the copy to host memory, for which training stops; the longest of all saves counts. Its
bar holds from 1 GB on. Steps beside the writing are compared with others, and their delay counts as
well. One thread writes, another hashes; what the first waits for the second has a bar as well.
Under torchrun the run's layout is used on all processes. Files are deleted at the end. The rows as
they stand are logged after each save, so a bench that is killed has told what it knew. A folder in
memory, or without room for two checkpoints, is refused before anything is built.
Exit code: 0 within the bars, 1 not, 2 wrong settings.
"""

_STALL_BAR = 0.5
"""Seconds for 10 GB of one rank's state."""
_DIGEST_BAR = 0.05
"""Of a save's time."""
_INTERVAL_S = 600.0
_ROOM = 2 * 1.05
"""Checkpoints that must fit: one that is kept and one that is written; sizes are known to 5 %."""
_GB = 1e9


def bench_checkpoint(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    saves: Annotated[int, typer.Option(min=1, help="Checkpoints to write.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Steps without a save, for comparison.")] = 5,
    out: Annotated[Path | None, typer.Option(help="For the files; a temporary folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train and save."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    setup_logging(rank=rank)
    with refusing_settings():
        run = load_checked(config, overrides or [], world_size=world_size)
    needed = int(checkpoint_bytes(run) * _ROOM) + (1 << 20)
    if problem := disk_problem(out, num_bytes=needed, option="--out"):
        typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS)
    from ghostvis_mega.checkpoint.together import on_every_rank
    from ghostvis_mega.session import local_device, open_world

    with (
        scratch("bench", out) as own,
        contextlib.redirect_stdout(sys.stderr),  # DeepSpeed prints what it builds
        open_world(run, device=local_device(run)) as world,
    ):
        folder = on_every_rank(lambda: own)[0]
        rows = _measure(run, world, folder, saves=saves, steps=steps)
    conclude(rows, title=f"checkpoints of {config}", as_json=as_json, show=rank == 0)


def _measure(run: Any, world: Any, folder: Path, *, saves: int, steps: int) -> list[Figure]:
    from ghostvis_mega.checkpoint.store import CheckpointStore
    from ghostvis_mega.data.dataset import Dataset
    from ghostvis_mega.engine.step import TrainEngine
    from ghostvis_mega.train.feed import Feed

    engine = TrainEngine(run, world.groups, device=world.device)
    feed = Feed(run, world.groups, Dataset.open(run.data.train))
    store = CheckpointStore(folder / "checkpoints", keep=1)
    done = 0

    def step() -> float:
        nonlocal done
        world.watchdog.alive(f"step {done + 1}")
        began = time.perf_counter()
        _, work = feed.get(done)
        engine.step(work, step=done)  # its loss is read, so the device has finished
        done += 1
        return time.perf_counter() - began

    began = time.perf_counter()
    store.prepare(engine)
    prepared = time.perf_counter() - began
    _tell("before the first save", [measured("taking host memory at the start", prepared, "s")])
    step()
    plain = [step() for _ in range(steps)]
    usual, stalls, writes, delays = median(plain), [], [], []
    saved: list[Any] = []
    rows: list[Figure] = []
    for number in range(saves):
        world.watchdog.alive("a save")
        store.begin(engine, step=done, extra={"data": feed.state()})
        stalls.append(store.stall_s)
        began, beside = time.perf_counter(), []
        while _on_any_rank(world, store.writing):
            beside.append(step())
        store.wait()
        writes.append(time.perf_counter() - began)
        saved.append(store.saved)
        delays.append(sum(seconds - usual for seconds in beside))
        figures = {"prepare": prepared, "step": usual, "state": store.state_bytes}
        path = store.saved.path
        rows = _rows(run, path, figures, stalls=stalls, writes=writes, delays=delays)
        rows += _digest_rows(saved)
        _tell(f"after save {number + 1} of {saves}", rows)
    feed.close()
    store.close()
    return rows


def _tell(when: str, rows: list[Figure]) -> None:
    """Log rows one by one, should this process not come to its end."""
    for row in rows:
        log.info("%s: %s", when, json.dumps(row))


def _on_any_rank(world: Any, here: bool) -> bool:
    """Whether it is so on any rank; all take the same steps."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor(float(here), device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=world.groups.world)
    return bool(flag)


def _rows(
    run: Any,
    path: Path,
    figures: dict[str, float],
    *,
    stalls: list[float],
    writes: list[float],
    delays: list[float],
) -> list[Figure]:
    """Of the slowest rank where they differ."""
    from ghostvis_mega.checkpoint.together import on_every_rank

    gathered = on_every_rank(lambda: {**figures, "stall": max(stalls), "delay": max(delays)})
    most = {key: max(one[key] for one in gathered) for key in gathered[0]}
    real = sum(file.stat().st_size for file in path.iterdir())
    planned = sum(one["state"] for one in gathered)
    # Of a small state some milliseconds are left that do not grow with it.
    bar = _STALL_BAR if most["state"] >= _GB else None
    kept = most["stall"] + max(0.0, most["delay"])
    return [
        measured("largest rank's state", most["state"] / _GB, "GB"),
        measured("checkpoint", real / _GB, "GB"),
        at_most("size predicted at the save, error", abs(planned / real - 1), "", 0.05),
        at_most(
            "size predicted from the settings, error",
            abs(checkpoint_bytes(run) / real - 1),
            "",
            0.05,
        ),
        measured("taking host memory at the start", most["prepare"], "s"),
        measured("step", most["step"], "s"),
        measured("longest stall", most["stall"], "s"),
        at_most("stall for 10 GB", most["stall"] / most["state"] * 10 * _GB, "s", bar),
        measured("delay of steps beside the writing", most["delay"], "s"),
        at_most("share of time, a save every 10 minutes", kept / _INTERVAL_S, "", 0.05),
        measured("written in", max(writes), "s"),
        measured("written, hashed and read back", real / _GB / max(writes), "GB/s"),
    ]


def _digest_rows(saved: list[Any]) -> list[Figure]:
    """What SHA-256 costs, over all saves."""
    seconds = sum(one.seconds for one in saved)
    beside, waited = (sum(getattr(one, key) for one in saved) for key in ("hashing_s", "waited_s"))
    return [
        measured("SHA-256 beside the writing, share of a save", beside / seconds, ""),
        at_most("a save that waits for SHA-256, share", waited / seconds, "", _DIGEST_BAR),
    ]
