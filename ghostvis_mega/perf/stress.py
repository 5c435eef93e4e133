"""Training on the worst batches in turn, in several layouts, with every rank's calls compared.

Each layout trains a tiny model through the ordinary loop, feed, decoder and checkpoints. Batches
are drawn from `perf.stress_data` step by step; now and then one rank's loss is no number. A job
hangs where ranks disagree about the next call, so they are compared every few steps.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import GlobalBatch
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.flat_gradients import FlatGradients
from ghostvis_mega.engine.step import StepInput, TrainEngine
from ghostvis_mega.model.flops import BatchFlops
from ghostvis_mega.parallel.groups import Groups, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.parallel.trace import CollectiveTrace, group_labels, trace_store
from ghostvis_mega.perf.stress_data import KINDS
from ghostvis_mega.perf.stress_layouts import (
    StressJob,
    StressLayout,
    settings_of,
    split_steps,
)
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.guards import Guards
from ghostvis_mega.train.loop import Loop
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.build import Observers
from ghostvis_mega.train.preflight import check_run
from ghostvis_mega.train.previews import Previewer
from ghostvis_mega.train.watchdog import Watchdog
from ghostvis_mega.utils.figures import Figure, at_least, at_most, measured

log = logging.getLogger(__name__)

COMPARE_EVERY = 10
"""Steps between comparisons."""
NAN_SHARE = 0.08
"""Of every other step: one rank's loss is no number. Never twice in a row: three end a run."""
_FIRST_FAULT = 3


class Stream:
    """A feed for the loop that turns to another dataset at every step, in an order that the seed
    alone decides.

    Args:
        run: Settings.
        groups: Of this rank.
        data: Folder of the datasets.
        seed: Of the order.
    """

    def __init__(self, run: RunConfig, groups: Groups, data: Path, *, seed: str):
        self.groups, self.seed = groups, seed
        self.feeds = {kind: Feed(run, groups, Dataset.open(data / f"{kind}.gvd")) for kind in KINDS}
        self.kinds: Counter[str] = Counter()
        self.current = self.feeds["mixed"]
        self.poisoned: int | None = None
        """Rank whose loss is no number in the step that was fetched last."""

    @property
    def corpus(self) -> Any:
        """Of the feed that gave the last batch."""
        return self.current.corpus

    def flops(self, batch: GlobalBatch) -> BatchFlops:
        """Operations of the last batch."""
        return self.current.flops(batch)

    def get(self, step: int) -> tuple[GlobalBatch, StepInput]:
        """The batch of a step."""
        draw = random.Random(f"{self.seed}/{step}")
        kind = draw.choice(tuple(KINDS))
        self.current = self.feeds[kind]
        self.poisoned = None
        if step % 2 and draw.random() < NAN_SHARE:
            self.poisoned = draw.choice(spoiling_ranks(kind, self.groups))
            kind = "no number"
        self.kinds[kind] += 1
        return self.current.get(step)


def spoiling_ranks(kind: str, groups: Groups) -> list[int]:
    """Ranks whose loss alone makes a batch of this kind one to skip.

    All of the last stage, by their gradients. Where nothing is trained there are none, and of the
    tensor ranks, which hold the same loss, only the first one's counts.
    """
    last = groups.degrees.pipeline - 1
    return [
        rank
        for rank, place in enumerate(groups.places)
        if place.pipeline == last and (kind != "nothing" or place.tensor == 0)
    ]


def poison(engine: TrainEngine, stream: Stream) -> None:
    """Make the loss of this rank no number in the steps for which the stream says so."""
    chunk = engine.parts.chunks[-1]
    honest = chunk.loss_sum

    def loss_sum(*args: Any, expected_grad: float) -> torch.Tensor:
        factor = float("nan") if stream.poisoned == stream.groups.rank else 1.0
        # The fused loss makes its gradients at once, for the gradient that it will get.
        return honest(*args, expected_grad=expected_grad * factor) * factor

    chunk.loss_sum = loss_sum


@dataclass
class Watcher:
    """The observer of a stressed run, on every rank: what must hold after each step."""

    stream: Stream
    compare: Callable[[], None]
    problems: list[str] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0

    def on_start(self, run: Any) -> None:
        """Nothing."""

    def on_step(self, m: StepMetrics) -> None:
        """A step was skipped where a loss was poisoned, and nowhere else; its loss is a number."""
        planted = self.stream.poisoned is not None
        self.skipped += m.skipped
        self.seconds += m.seconds
        if m.skipped != planted:
            happened = "skipped" if m.skipped else "not skipped"
            cause = "a loss was no number" if planted else "all losses were sound"
            self.problems.append(f"step {m.step} was {happened} though {cause}")
        if m.step % COMPARE_EVERY == 0:
            self.compare()

    def on_preview(self, step: int, previews: Any) -> None:
        """Nothing."""

    def on_end(self, summary: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Outcome:
    """One layout's result, as rank 0 saw it."""

    layout: str
    steps: int
    seconds: float
    """Of the steps."""
    cpu_s: float
    """Of rank 0, answers and checkpoints included."""
    kinds: dict[str, int]
    skipped: int
    problems: list[str]
    calls: int
    """To other ranks, by rank 0."""
    comparisons: int

    @classmethod
    def of(
        cls,
        layout: StressLayout,
        watcher: Watcher,
        trace: CollectiveTrace,
        *,
        cpu_s: float,
        steps: int,
    ) -> "Outcome":
        """What the observers of a layout have seen."""
        return cls(
            layout=layout.name,
            steps=steps,
            seconds=watcher.seconds,
            cpu_s=cpu_s,
            kinds=dict(watcher.stream.kinds),
            skipped=watcher.skipped,
            problems=watcher.problems,
            calls=trace.num_calls,
            comparisons=trace.comparisons,
        )


def stress_layout(
    layout: StressLayout,
    job: StressJob,
    *,
    steps: int,
    device: torch.device,
    watchdog: Watchdog,
    save: Callable[[TrainEngine, Path, int], None],
) -> Outcome:
    """Train `steps` bad steps in one layout; collective.

    Args:
        layout: How the model is spread; its groups are built here.
        job: Folder, seed, fault.
        steps: Of this layout.
        device: Of this rank.
        watchdog: Ends this process where a step hangs.
        save: Writes a checkpoint of the engine into a folder after so many steps.

    Raises:
        TraceMismatch: Ranks made calls that do not fit together.
    """
    run = settings_of(layout, job, steps=steps, cuda=device.type == "cuda")
    world_size = dist.get_world_size()
    check_run(run, world_size=world_size, device="cuda" if device.type == "cuda" else "cpu")
    destroy_groups()
    groups = build_groups(Degrees.of(run, world_size=world_size), seed=job.seed)
    trace = CollectiveTrace(
        rank=groups.rank,
        labels=group_labels(groups),
        path=job.folder / f"trace{groups.rank}.jsonl",
    )
    store = dist.PrefixStore(layout.name, trace_store())

    def compare() -> None:
        trace.check(store, world_size=world_size, timeout_s=job.step_timeout_s)

    with trace:
        engine = TrainEngine(run, groups, device=device)
        stream = Stream(run, groups, job.folder / "data", seed=f"{job.seed}/{layout.name}")
        watcher = Watcher(stream, compare)
        poison(engine, stream)
        if job.fault is not None:
            plant(job.fault, engine)
        loop = Loop(
            engine=engine,
            feed=cast(Feed, stream),
            observers=Observers([watcher]),
            watchdog=watchdog,
            previewer=Previewer(engine, Dataset.open(run.data.heldout), run),
            save=lambda done: save(engine, job.folder / f"{layout.name}-checkpoints", done),
            guards=Guards(run, places=groups.places, rank=groups.rank),
        )
        began = time.process_time()
        loop.run(start=0)
        cpu_s = time.process_time() - began
        compare()
        engine.close()
    return Outcome.of(layout, watcher, trace, cpu_s=cpu_s, steps=steps)


def stress(
    job: StressJob,
    *,
    device: torch.device,
    watchdog: Watchdog,
    save: Callable[[TrainEngine, Path, int], None],
) -> list[Outcome]:
    """All layouts one after the other; collective."""
    outcomes = []
    shares = split_steps(job.steps, len(job.layouts))
    for layout, steps in zip(job.layouts, shares, strict=True):
        watchdog.alive(f"building {layout.name}")
        outcome = stress_layout(
            layout, job, steps=steps, device=device, watchdog=watchdog, save=save
        )
        outcomes.append(outcome)
        log.info(
            "%s: %d steps in %.1f s, %d skipped, %d calls of rank 0",
            layout.name, steps, outcome.seconds, outcome.skipped, outcome.calls,
        )  # fmt: skip
    return outcomes


def plant(fault: str, engine: TrainEngine) -> None:
    """Break rank 1 from its fourth step on."""
    if engine.groups.rank != 1:
        return
    honest = engine.update

    def update(*args: Any, step: int, **keywords: Any) -> Any:
        if step >= _FIRST_FAULT:
            FAULTS[fault](engine)
        return honest(*args, step=step, **keywords)

    engine.update = update


def _skip(engine: TrainEngine) -> None:
    """The next all-reduce is left out."""
    honest = dist.all_reduce

    def nothing(*_: Any, **__: Any) -> None:
        dist.all_reduce = honest

    dist.all_reduce = nothing


def _bucket(engine: TrainEngine) -> None:
    """Gradients travel in smaller pieces."""
    for zero in engine.engines:

        def in_pieces(flat: FlatGradients = zero.flat) -> None:
            for total, group in zip(flat.totals, flat.groups, strict=True):
                for piece in total.split(256):
                    dist.all_reduce(piece, group=group)

        zero.flat.reduce = in_pieces


def _stall(engine: TrainEngine) -> None:
    """The rank waits for ever."""
    threading.Event().wait()


FAULTS: dict[str, Callable[[TrainEngine], None]] = {
    "skip": _skip,
    "bucket": _bucket,
    "stall": _stall,
}


def rows_of(outcomes: Sequence[Outcome], *, steps: int) -> list[Figure]:
    """Rows of name, value, unit, bar and ok of what was done; who started the ranks knows best
    how they ended."""
    done = sum(outcome.steps for outcome in outcomes)
    rows = [
        at_least("steps", done, "steps", steps),
        measured(
            "comparisons",
            sum(o.comparisons for o in outcomes),
            "",
            bar=len(outcomes),
            ok=all(o.comparisons > 0 for o in outcomes),
        ),
        measured("calls of rank 0", sum(o.calls for o in outcomes)),
    ]
    problems = [f"{o.layout}: {problem}" for o in outcomes for problem in o.problems]
    rows.append(at_most("steps wrongly skipped, or not", len(problems), "steps", 0))
    totals: Counter[str] = Counter()
    for outcome in outcomes:
        totals.update(outcome.kinds)
    for kind in (*KINDS, "no number"):
        what = KINDS.get(kind, "a loss on one rank that is no number: skipped on all")
        rows.append(at_least(f"{kind}: {what}", totals[kind], "steps", 1))
    for outcome in outcomes:
        rows.append(measured(f"{outcome.layout}: time", outcome.seconds / outcome.steps, "s/step"))
        cpu = outcome.cpu_s / outcome.steps
        rows.append(measured(f"{outcome.layout}: CPU time of rank 0", cpu, "s/step"))
    return rows + [at_most(problem, 1, "step", 0) for problem in problems[:10]]
