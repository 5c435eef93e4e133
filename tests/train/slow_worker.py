"""Two gloo ranks, of which one is slowed in a section or has more to do."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import GuardsConfig
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.engine.vision import VisionRunner
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.parallel.exchange import EmbeddingExchange
from ghostvis_mega.parallel.groups import build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.parallel.trace import group_labels
from ghostvis_mega.perf.stress_data import write_datasets
from ghostvis_mega.perf.stress_layouts import (
    LAYOUTS,
    StressJob,
    StressLayout,
    settings_of,
    write_deepspeed_files,
)
from ghostvis_mega.session import Training, World, open_world
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.slow_ranks import SlowRanks
from ghostvis_mega.utils.timing import SectionTimer
from tests.launch import write_result

WINDOW = 10
PHASE = 2 * WINDOW
SLOW = {1: ("vision", 1), 2: ("llm", 0), 3: ("data", 1), 4: ("exchange", 0)}
"""By phase of a training run: the section that is slowed, and the rank. Nothing is in phase 0."""
OTHERS = {"tp2": ("llm", 1), "pp2": ("vision", 0), "cp2": ("llm", 0)}
"""The same for runs of one window in other layouts."""
PAUSE_S = 0.06
"""Far above what such small sections take, and what a busy machine adds."""


def imitated_steps(world: World, folder: Path, *, more: int, steps: int) -> list[Any]:
    """Sections of which the durations are known; the waits for each other are real.

    Rank 1 has `more` times the pictures of rank 0.
    """
    groups, timer = world.groups, SectionTimer(torch.device("cpu"))
    settings = GuardsConfig(slow_rank_window=20)
    slow = SlowRanks(settings, places=groups.places, rank=groups.rank, folder=folder)
    images = 4 * (more if groups.rank == 1 else 1)
    work = {"data": 1 + images, "vision": 1 + images, "llm": 100, "exchange": 1 + 2 * images}
    found = []
    for step in range(steps):
        told = slow.tell(step)
        rows = torch.zeros(2, len(told))
        if told:
            rows[groups.rank] = torch.tensor(told)
        world.calls.waiting = timer.waiting if slow.measures(step) else None
        with timer.section("data"):
            time.sleep(0.0005 * images)
        with timer.section("vision"):
            time.sleep(0.0005 * images)
        with timer.section("exchange"):
            time.sleep(0.001)
            dist.barrier()
        with timer.section("llm"):
            time.sleep(0.004)
            dist.all_reduce(rows)
        seconds = timer.read()
        if slow.measures(step):
            own = {name: value - timer.waits.get(name, 0.0) for name, value in seconds.items()}
            slow.note(own, work)
        found += slow.judge(rows.tolist(), step=step)
    world.calls.waiting = None
    return [[slow.rank, slow.section, slow.factor] for slow in found]


def slowed(honest: Callable, section: str, state: dict[str, Any]) -> Callable:
    """The function, preceded by a pause in its phase on its rank."""

    def run(*args: Any, **keywords: Any) -> Any:
        if state["slow"].get(state["phase"]) == (section, state["rank"]):
            time.sleep(PAUSE_S)
        return honest(*args, **keywords)

    return run


def training(
    world: World,
    job: StressJob,
    layout: StressLayout,
    slow: dict[int, tuple[str, int]],
    *,
    steps: int,
) -> str:
    """A real run whose phases are slowed as told; returns what it has written down."""
    run = settings_of(layout, job, steps=steps, cuda=False)
    run = run.model_copy(
        update={
            "guards": GuardsConfig(slow_rank_window=WINDOW, spike="none", slow_rank_factor=3),
            "log": run.log.model_copy(update={"preview_steps": ()}),
            "checkpoint": run.checkpoint.model_copy(update={"save_every": 0}),
        }
    )
    state = {"phase": 0, "rank": world.groups.rank, "slow": slow}
    honest = TrainEngine.step
    get = slowed(Feed.get, "data", state)

    def step(engine: TrainEngine, work: Any, *, step: int, **keywords: Any) -> Any:
        result = honest(engine, work, step=step, **keywords)
        state["phase"] = (step + 1) // PHASE
        return result

    patches = (
        mock.patch.object(TrainEngine, "step", step),
        mock.patch.object(Feed, "get", get),
        mock.patch.object(VisionRunner, "encode", slowed(VisionRunner.encode, "vision", state)),
        mock.patch.object(LLMChunk, "loss_sum", slowed(LLMChunk.loss_sum, "llm", state)),
        mock.patch.object(
            EmbeddingExchange,
            "embeddings",
            slowed(EmbeddingExchange.embeddings, "exchange", state),
        ),
    )
    for patch in patches:
        patch.start()
    Training(run, world).execute()
    for patch in patches:
        patch.stop()
    return (run.log.output / "slow_ranks.jsonl").read_text() if world.groups.rank == 0 else ""


def spread(world: World, job: StressJob, layout: StressLayout) -> World:
    """The same ranks in another layout."""
    run = settings_of(layout, job, steps=1, cuda=False)
    destroy_groups()
    degrees = Degrees.of(run, world_size=dist.get_world_size())
    groups = build_groups(degrees, seed=run.train.seed)
    world.calls.labels = group_labels(groups)
    return dataclasses.replace(world, groups=groups)


def main() -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = Path(os.environ["LAUNCH_FOLDER"])
    job = StressJob(folder / "job", LAYOUTS[:1], steps=1, seed=3, step_timeout_s=200)
    with open_world(
        settings_of(LAYOUTS[0], job, steps=1, cuda=False), device=torch.device("cpu")
    ) as world:
        results: dict[str, Any] = {
            "balanced": imitated_steps(world, folder, more=1, steps=500),
            "more pictures": imitated_steps(world, folder, more=4, steps=500),
        }
        if world.groups.rank == 0:
            write_datasets(job.folder / "data")
            write_deepspeed_files(job)
        dist.barrier()
        results["training"] = training(world, job, LAYOUTS[0], SLOW, steps=5 * PHASE + 1)
        for name, slow in OTHERS.items():
            layout = next(layout for layout in LAYOUTS if layout.name == name)
            its = spread(world, job, layout)
            results[name] = training(its, job, layout, {0: slow}, steps=WINDOW + 1)
        if world.groups.rank == 0:
            write_result(results)


if __name__ == "__main__":
    main()
