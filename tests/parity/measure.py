"""Measuring a layout against the plain reference, inside the ranks of one launch."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.engine.inspect import reduced_gradient, relative_errors, rounding_only
from ghostvis_mega.engine.optimizer import module_of
from ghostvis_mega.engine.step import StepInput, StepResult, TrainEngine
from ghostvis_mega.parallel.groups import Groups, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.reference import PlainTrainer
from tests.parity.layouts import Layout
from tests.parity.problem import STEPS, make_rows, make_run, merge, step_input

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Truth:
    """What the plain process computed."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step."""
    weights: dict[str, torch.Tensor]
    """After the last step."""

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the first gradient by module."""
        squares: dict[str, float] = {}
        for name, gradient in self.gradients.items():
            squares[module_of(name)] = squares.get(module_of(name), 0.0) + float(
                gradient.square().sum()
            )
        return {module: square**0.5 for module, square in squares.items()}


class Lab:
    """Groups and references that several measurements share.

    Args:
        folder: For the DeepSpeed files of this rank.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self.truths: dict[str, Truth] = {}
        self._groups: Groups | None = None

    def run_of(self, layout: Layout) -> RunConfig:
        """Settings of a layout."""
        sections = merge(layout.problem, layout.split)
        return make_run(self.folder, stage=layout.stage, overlap=layout.overlap, **sections)

    def groups(self, degrees: Degrees) -> Groups:
        """Groups of these degrees; those of the last call when the degrees are the same."""
        if self._groups is None or self._groups.degrees != degrees:
            if self._groups is not None:
                destroy_groups()
            self._groups = build_groups(degrees, seed=1)
        return self._groups

    def engine(self, layout: Layout) -> TrainEngine:
        """A new engine of a layout."""
        run = self.run_of(layout)
        groups = self.groups(Degrees.of(run, world_size=dist.get_world_size()))
        return TrainEngine(run, groups, device=CPU)

    def solve_all(self, layouts: list[Layout]) -> None:
        """Compute every reference once, the work spread over the ranks."""
        problems = {truth_key(layout): layout for layout in layouts}
        alone = Layout(name="no parallelism")
        groups = self.groups(Degrees.of(self.run_of(alone), world_size=dist.get_world_size()))
        for turn, (key, layout) in enumerate(problems.items()):
            if turn % dist.get_world_size() == groups.rank:
                self.truths[key] = self.solve(layout, groups)
        for turn, key in enumerate(problems):
            box = [self.truths.get(key)]
            dist.broadcast_object_list(box, turn % dist.get_world_size())
            assert box[0] is not None
            self.truths[key] = box[0]

    def solve(
        self,
        layout: Layout,
        groups: Groups,
        change: Callable[[PlainTrainer], None] = lambda trainer: None,
    ) -> Truth:
        """Train a layout's problem in this process alone.

        Args:
            layout: Its `problem`, `kind` and `stage` count.
            groups: Without tensor and pipeline parallelism.
            change: Applied to the fresh trainer.
        """
        run = make_run(self.folder, **layout.problem)
        trainer = PlainTrainer(run, groups, device=CPU)
        change(trainer)
        losses, norms, gradients = [], [], {}
        for step in range(STEPS):
            rows, pictures = make_rows(run, kind=layout.kind, step=step)
            losses.append(trainer.backward(rows, pictures))
            gradients = gradients or trainer.gradients()
            norms.append(trainer.update(step=step))
        weights = {name: p.detach().clone() for name, p in trainer.parameters().items()}
        return Truth(losses=losses, norms=norms, gradients=gradients, weights=weights)

    def batch(
        self,
        engine: TrainEngine,
        layout: Layout,
        step: int,
        alter: Callable[[list[MicroBatch]], None] | None = None,
    ) -> StepInput:
        """This rank's part of a step's batch; `alter` may replace its rows."""
        rows, pictures = make_rows(engine.run, kind=layout.kind, step=step)
        if alter is not None:
            alter(rows)
        return step_input(engine.run, engine.groups, rows, pictures)

    def measure(
        self,
        layout: Layout,
        *,
        truth: Truth | None = None,
        alter: Callable[[list[MicroBatch]], None] | None = None,
        prepare: Callable[[TrainEngine], None] = lambda engine: None,
    ) -> dict[str, Any]:
        """Three steps of a layout as a row of JSON.

        Args:
            layout: What to run.
            truth: Reference, by default the solved one.
            alter: Changes the rows of every batch.
            prepare: Changes the fresh engine.
        """
        started = time.monotonic()
        truth = truth or self.truths[truth_key(layout)]
        engine = self.engine(layout)
        prepare(engine)
        results: list[StepResult] = []
        gradients: dict[str, float] = {}
        for step in range(STEPS):
            batch = self.batch(engine, layout, step, alter)
            if step == 0:
                with watch_gradient(engine, truth.gradients) as gradients:
                    results.append(engine.step(batch, step=step))
            else:
                results.append(engine.step(batch, step=step))
        return compare(engine, truth, results, gradients) | {
            "seconds": round(time.monotonic() - started, 2)
        }


def truth_key(layout: Layout) -> str:
    """What decides a layout's reference."""
    return json.dumps([layout.kind, layout.problem], sort_keys=True)


@contextlib.contextmanager
def watch_gradient(
    engine: TrainEngine, truth: dict[str, torch.Tensor]
) -> Iterator[dict[str, float]]:
    """Relative errors of the reduced gradients of the step inside, filled in before the update."""
    errors: dict[str, float] = {}
    update = engine.update

    def compare_then_update(*args: Any, **keywords: Any) -> StepResult:
        errors.update(relative_errors(engine, truth, reduced_gradient(engine)))
        return update(*args, **keywords)

    engine.update = compare_then_update
    try:
        yield errors
    finally:
        engine.update = update


def weight_errors(engine: TrainEngine, truth: Truth) -> dict[str, float]:
    """Relative errors of all weights, frozen ones included.

    Parameters whose gradient would be zero without rounding are left out: Adam turns that noise
    into steps.
    """
    owner = {id(p): zero for zero in engine.engines for p in zero.trained}
    errors = relative_errors(
        engine, truth.weights, lambda p: owner[id(p)].weight(p) if id(p) in owner else p.data
    )
    noise = {name for name in rounding_only(truth.gradients) if truth.gradients[name].any()}
    return {name: error for name, error in errors.items() if name not in noise}


def compare(
    engine: TrainEngine, truth: Truth, results: list[StepResult], gradients: dict[str, float]
) -> dict[str, Any]:
    """A row of JSON: what the layout got and how far that is from the truth."""
    weights = weight_errors(engine, truth)
    worst = max(gradients, key=lambda name: gradients[name])
    worst_weight = max(weights, key=lambda name: weights[name])
    return {
        "gradient_error": gradients[worst],
        "gradient_name": worst,
        "weight_error": weights[worst_weight],
        "weight_name": worst_weight,
        "loss_error": max(abs(r.loss - t) / t for r, t in zip(results, truth.losses, strict=True)),
        "norm_error": max(
            abs(r.grad_norm - t) / max(t, 1e-12) for r, t in zip(results, truth.norms, strict=True)
        ),
        "losses": [r.loss for r in results],
        "truth_norms": truth.gradient_norms(),
        "gradients": gradients,
    }
