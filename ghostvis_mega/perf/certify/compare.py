"""How far what a layout holds is from the reference, and which figure is the worst."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega.engine.inspect import (
    reduced_gradient,
    relative,
    relative_errors,
    rounding_only,
    square_distances,
)
from ghostvis_mega.engine.step import StepResult, TrainEngine
from ghostvis_mega.perf.certify.truth import Truth
from ghostvis_mega.utils.worst import worst

Row = dict[str, Any]
QUIET = 0.1
"""Share of the joint noise below which a parameter's own noise counts as this much."""


@contextlib.contextmanager
def watch_gradient(engine: TrainEngine, truth: Truth) -> Iterator[dict[str, float]]:
    """Relative errors of the reduced gradients of the step inside, filled in before the update."""
    errors: dict[str, float] = {}
    update = engine.update

    def compare_then_update(*args: Any, **keywords: Any) -> StepResult:
        errors.update(relative_errors(engine, truth.gradients, reduced_gradient(engine)))
        return update(*args, **keywords)

    engine.update = compare_then_update
    try:
        yield errors
    finally:
        engine.update = update


def weight_errors(engine: TrainEngine, truth: Truth) -> dict[str, float]:
    """Relative errors of all weights, frozen ones included; see `final_errors`."""
    return final_errors(engine, truth)[0]


def final_errors(engine: TrainEngine, truth: Truth) -> tuple[dict[str, float], dict[str, float]]:
    """Distances of all weights to the truth, frozen ones included.

    Parameters whose gradient would be zero without rounding are left out: Adam turns that noise
    into steps.

    Returns:
        Relative to the weights, and relative to what the steps changed of them: a weight that is
        never updated is 1 off there, however small the steps are. In BF16 that is measured on the
        fp32 weights of the optimizer.
    """
    owner = {id(p): zero for zero in engine.engines for p in zero.trained}
    squares = square_distances(
        engine, truth.weights, lambda p: owner[id(p)].weight(p) if id(p) in owner else p.data
    )
    moved = squares
    if truth.from_rounded:
        # A few steps change less of a weight than BF16 rounds away, of the start and of the end.
        moved = square_distances(
            engine,
            truth.from_rounded,
            lambda p: owner[id(p)].master(p) if id(p) in owner else p.data,
        )
    changes = {name: (distance, truth.changes[name]) for name, (distance, _) in moved.items()}
    noise = {name for name in rounding_only(truth.squares) if truth.squares[name] > 0}
    weights, updates = (
        {name: error for name, error in relative(given).items() if name not in noise}
        for given in (squares, changes)
    )
    return weights, updates


def compare(
    engine: TrainEngine, truth: Truth, results: list[StepResult], gradients: dict[str, float]
) -> Row:
    """A row of JSON: what the layout got and how far that is from the truth."""
    weights, updates = final_errors(engine, truth)
    gradient_name, gradient_error = worst(gradients.items())
    weight_name, weight_error = worst(weights.items())
    update_name, update_error = worst(updates.items())
    pairs = list(enumerate(zip(results, zip(truth.losses, truth.norms, strict=True), strict=True)))
    whole = sum(truth.squares.values()) or 1.0
    distance = sum(gradients[name] ** 2 * square for name, square in truth.squares.items())
    return {
        "gradient_error": gradient_error,
        "gradient_name": gradient_name,
        "joint_error": (distance / whole) ** 0.5,
        "weight_error": weight_error,
        "weight_name": weight_name,
        "update_error": update_error,
        "update_name": update_name,
        "loss_error": worst((step, abs(r.loss - loss) / loss) for step, (r, (loss, _)) in pairs)[1],
        "norm_error": worst(
            (step, abs(r.grad_norm - norm) / max(norm, 1e-12)) for step, (r, (_, norm)) in pairs
        )[1],
        "losses": [r.loss for r in results],
        "truth_norms": truth.gradient_norms(),
        "layers_per_stage": _layers_per_stage(engine),
        "offloaded": {
            "llm" if zero is engine.parts.llm_engine else "vision": zero.on_host
            for zero in engine.engines
        },
        "gradients": gradients,
        "updates": updates,
    }


def _layers_per_stage(engine: TrainEngine) -> list[int]:
    """LLM layers that the ranks of each pipeline stage really hold; collective."""
    stages = torch.zeros(engine.groups.degrees.pipeline, dtype=torch.int64, device=engine.device)
    stages[engine.groups.place.pipeline] = sum(len(c.decoder.layers) for c in engine.parts.chunks)
    dist.all_reduce(stages, op=dist.ReduceOp.MAX, group=engine.groups.world)
    return stages.tolist()


def beside_noise(row: Row, noise: Row, truth: Truth) -> Row:
    """What a row in BF16 gets beside it: its noise, and the parameters that are most above their
    own, in the gradient and in the update.

    Parameters whose gradient is rounding alone have no noise to speak of.
    """
    empty = rounding_only(truth.squares)
    gradients = {name: error for name, error in row["gradients"].items() if name not in empty}
    ratios = over_noise(gradients, noise["gradients"], floor=QUIET * noise["joint_error"])
    updates = over_noise(row["updates"], noise["updates"], floor=noise["joint_error"])
    name, ratio = worst(ratios.items()) if ratios else ("nothing to learn", 0.0)
    update_name, update_ratio = worst(updates.items())
    keys = ("joint_error", "loss_error", "norm_error", "weight_error", "update_error")
    own = {name: noise["gradients"][name] for name in gradients}
    worst_own = worst(own.items()) if own else ("nothing to learn", 0.0)
    return {
        "noise": {key: noise[key] for key in keys} | {"gradient_error": worst_own[1]},
        "noise_name": worst_own[0],
        "ratio": ratio,
        "ratio_name": name,
        "ratios": ratios,
        "update_ratio": update_ratio,
        "update_ratio_name": update_name,
    }


def over_noise(
    errors: Mapping[str, float], noise: Mapping[str, float], *, floor: float
) -> dict[str, float]:
    """Errors in units of their own noise, which counts as `floor` where it is less."""
    return {
        # So written, a NaN of the noise stays one.
        name: error / (floor if noise[name] <= floor else noise[name])
        for name, error in errors.items()
    }
