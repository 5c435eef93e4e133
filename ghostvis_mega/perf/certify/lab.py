"""Measuring layouts against the plain reference, inside the ranks of one launch."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import ParallelConfig, RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.engine.step import StepInput, StepResult, TrainEngine
from ghostvis_mega.parallel.groups import Groups, Place, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.certify.bars import noise_caps
from ghostvis_mega.perf.certify.compare import Row, beside_noise, compare, watch_gradient
from ghostvis_mega.perf.certify.layout import Layout
from ghostvis_mega.perf.certify.problem import STEPS, Stream, SyntheticStream, run_of, step_input
from ghostvis_mega.perf.certify.truth import Truth, read_truth, write_truth
from ghostvis_mega.perf.reference import PlainTrainer

CPU = torch.device("cpu")
Alter = Callable[[list[MicroBatch]], None]

NOT_OF_THE_PROBLEM = {
    "parallel": None,
    "tower": None,
    "deepspeed": None,
    "checkpoint": None,
    "log": None,
    "batch": ("micro_size",),
    "data": ("heldout", "num_workers", "bad_sample_budget"),
    "train": ("recompute", "fused_loss", "fused_rope", "fused_wgrad", "device", "timeout_s"),
}
"""Settings (whole sections, or keys of one) that say how a step is computed, not what."""


@dataclass(frozen=True)
class Case:
    """A layout with its settings and the batches it trains on."""

    name: str
    run: RunConfig
    stream: Stream
    measured_eps: bool = False
    """Choose AdamW's `eps` as large as the gradients' elements are. A tiny one turns the rounding
    of small elements into whole steps, which no layout has alike."""

    @property
    def problem(self) -> str:
        """What decides the reference; cases of equal problems share one."""
        settings = self.run.model_dump(mode="json")
        for section, keys in NOT_OF_THE_PROBLEM.items():
            for key in keys or list(settings[section]):
                settings[section].pop(key, None)
        return json.dumps([self.stream.key, settings], sort_keys=True)


class Lab:
    """Groups and references that several measurements share.

    Args:
        folder: Seen by all ranks; takes the references and this rank's DeepSpeed files.
        groups: Those that exist already, if any.
        device: Of this process.
        steps: Optimizer steps of each measurement.
        alive: Told what is done before each step, and each row of a reference.
    """

    def __init__(
        self,
        folder: Path,
        *,
        groups: Groups | None = None,
        device: torch.device = CPU,
        steps: int = STEPS,
        alive: Callable[[str], None] = lambda _: None,
    ):
        self.alive = alive
        self.folder, self.device, self.steps = folder, device, steps
        self.truths: dict[str, Truth] = {}
        self.noise: dict[str, Row] = {}
        """Of problems in BF16, what one process that computes in BF16 is off."""
        self._groups = groups

    def case(self, layout: Layout) -> Case:
        """A layout of the small random problem."""
        own = self.folder / f"rank{dist.get_rank()}"
        own.mkdir(exist_ok=True, parents=True)
        stream = SyntheticStream(kind=layout.kind, align=layout.align)
        return Case(name=layout.name, run=run_of(layout, own), stream=stream)

    def groups(self, degrees: Degrees) -> Groups:
        """Groups of these degrees; those of the last call when the degrees are the same."""
        if self._groups is None or self._groups.degrees != degrees:
            if self._groups is not None:
                destroy_groups()
            self._groups = build_groups(degrees, seed=1)
        return self._groups

    def alone(self) -> Groups:
        """Groups in which this rank is a world of its own; collective."""
        one = Degrees(world_size=1, tensor=1, pipeline=1, virtual_pipeline=1, context=1, data=1)
        world = dist.get_world_size()
        groups = self.groups(replace(one, world_size=world, data=world))
        place = Place(**dict.fromkeys(Place.__dataclass_fields__, 0))
        return replace(
            groups,
            degrees=one,
            rank=0,
            place=place,
            places=(place,),
            data=groups.alone,
            model=groups.alone,
            world=groups.alone,
        )

    def engine(self, case: Case, *, eps: float | None = None) -> TrainEngine:
        """A new engine of a case, with AdamW's `eps` if it is given."""
        groups = self.groups(Degrees.of(case.run, world_size=dist.get_world_size()))
        return TrainEngine(with_eps(case.run, eps), groups, device=self.device)

    def solve_all(self, cases: Iterable[Case]) -> None:
        """Compute every reference that is still missing, the work spread over the ranks."""
        problems: dict[str, Case] = {}
        for case in cases:
            problems.setdefault(case.problem, case)
        missing = [key for key in problems if key not in self.truths]
        groups = self.alone()
        rank, world = dist.get_rank(), dist.get_world_size()
        paths = {
            key: self.folder / f"truth{len(self.truths) + number}.json"
            for number, key in enumerate(missing)
        }
        for key in missing[rank::world]:
            write_truth(paths[key], self.solve(problems[key], groups))
        # Not in a collective: its time limit is that of a step, and a reference takes many.
        while not all(path.exists() for path in paths.values()):
            self.alive("waiting for references of other ranks")
            time.sleep(0.05)
        dist.barrier()
        self.truths |= {key: read_truth(path) for key, path in paths.items()}
        for key in missing:
            # All ranks do all of them, each by itself: whatever a library may wait for is there.
            if problems[key].run.train.precision == "bf16":
                self.noise[key] = self.measure_noise(problems[key], groups)

    def measure_noise(self, case: Case, groups: Groups, *, truth: Truth | None = None) -> Row:
        """A case's problem in its own precision and this process alone: the noise of rounding.

        Args:
            case: What to run; how it is spread does not count.
            groups: Of `alone`.
            truth: Reference, by default the solved one.
        """
        truth = truth or self.truths[case.problem]
        engine = TrainEngine(with_eps(undivided(case.run), truth.eps), groups, device=self.device)
        return self._measure(engine, case, truth)

    def solve(
        self,
        case: Case,
        groups: Groups,
        change: Callable[[PlainTrainer], None] = lambda trainer: None,
    ) -> Truth:
        """Train a case's problem in this process alone.

        Args:
            case: What to solve; how it is spread does not count.
            groups: Of `alone`.
            change: Applied to the fresh trainer.
        """
        trainer = PlainTrainer(case.run, groups, device=self.device)
        change(trainer)
        start = {name: p.detach().to(CPU, copy=True) for name, p in trainer.parameters().items()}
        losses, norms, gradients, eps = [], [], {}, None
        for step in range(self.steps):
            rows, pictures = case.stream.rows(case.run, groups, step)
            losses.append(
                trainer.backward(
                    rows,
                    pictures,
                    step=step,
                    progress=lambda: self.alive(f"the reference of {case.name}"),
                )
            )
            if step == 0:
                gradients = trainer.gradients()
                if case.measured_eps:
                    eps = element_size(gradients, clip_norm=case.run.optim.clip_norm)
                    for group in trainer.optimizer.param_groups:
                        group["eps"] = eps
            norms.append(trainer.update(step=step))
        weights = {name: p.detach().clone() for name, p in trainer.parameters().items()}
        moved = {name: weight.cpu() - start[name] for name, weight in weights.items()}
        in_bf16 = case.run.train.precision == "bf16"
        return Truth(
            losses=losses,
            norms=norms,
            gradients=gradients,
            weights=weights,
            squares={name: float(g.double().square().sum()) for name, g in gradients.items()},
            changes={name: float(change.double().square().sum()) for name, change in moved.items()},
            from_rounded={
                name: start[name].bfloat16().float() + change
                for name, change in (moved if in_bf16 else {}).items()
            },
            eps=eps,
        )

    def batch(
        self, engine: TrainEngine, case: Case, step: int, alter: Alter | None = None
    ) -> StepInput:
        """This rank's part of a step's batch; `alter` may replace its rows."""
        if alter is None:
            return case.stream.step_input(engine.run, engine.groups, step)
        rows, pictures = case.stream.rows(engine.run, engine.groups, step)
        alter(rows)
        return step_input(engine.run, engine.groups, rows, pictures, step=step)

    def measure(
        self,
        case: Case,
        *,
        truth: Truth | None = None,
        noise: Row | None = None,
        alter: Alter | None = None,
        prepare: Callable[[TrainEngine], None] = lambda engine: None,
    ) -> Row:
        """A few steps of a case as a row of JSON, equal on all ranks but for the seconds.

        Args:
            case: What to run.
            truth: Reference, by default the solved one.
            noise: Of one process in BF16, by default the measured one.
            alter: Changes the rows of every batch.
            prepare: Changes the fresh engine.
        """
        started = time.monotonic()
        truth = truth or self.truths[case.problem]
        row = self._measure(self.engine(case, eps=truth.eps), case, truth, alter, prepare)
        noise = noise or self.noise.get(case.problem)
        if noise is not None:
            caps = noise_caps(fp8=case.run.train.fp8 != "none")
            row |= beside_noise(row, noise, truth) | {"noise_caps": caps}
        return row | {"seconds": round(time.monotonic() - started, 2)}

    def _measure(
        self,
        engine: TrainEngine,
        case: Case,
        truth: Truth,
        alter: Alter | None = None,
        prepare: Callable[[TrainEngine], None] = lambda engine: None,
    ) -> Row:
        prepare(engine)
        results: list[StepResult] = []
        gradients: dict[str, float] = {}
        for step in range(self.steps):
            self.alive(f"step {step} of {case.name}")
            batch = self.batch(engine, case, step, alter)
            if step == 0:
                with watch_gradient(engine, truth) as gradients:
                    results.append(engine.step(batch, step=step))
            else:
                results.append(engine.step(batch, step=step))
        row = compare(engine, truth, results, gradients)
        engine.close()
        return row


def undivided(run: RunConfig) -> RunConfig:
    """A run without any division of its work."""
    return run.model_copy(
        update={
            "parallel": ParallelConfig(),
            "batch": run.batch.model_copy(update={"micro_size": 1}),
            "train": run.train.model_copy(update={"recompute": "none"}),
        }
    )


def with_eps(run: RunConfig, eps: float | None) -> RunConfig:
    """A run with another `eps` of AdamW; the same run without one."""
    if eps is None:
        return run
    return run.model_copy(update={"optim": run.optim.model_copy(update={"eps": eps})})


def element_size(gradients: Mapping[str, torch.Tensor], *, clip_norm: float) -> float:
    """Root mean square of all elements after the clip."""
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    count = sum(g.numel() for g in gradients.values())
    return (min(norm, clip_norm) if clip_norm > 0 else norm) / count**0.5
