"""Steps with a NaN on one rank: skipped on all, and as if they had never been."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.engine.zero import ZeroEngine
from ghostvis_mega.perf.certify.compare import weight_errors
from ghostvis_mega.perf.certify.lab import Lab
from ghostvis_mega.perf.certify.layout import Layout
from ghostvis_mega.perf.certify.problem import STEPS
from ghostvis_mega.utils.worst import worst

NAN = float("nan")


@contextlib.contextmanager
def nan_in_loss(engine: TrainEngine) -> Iterator[None]:
    """What the loss of every micro-batch sees on the last rank, which is on the last stage."""
    chunk = engine.parts.chunks[-1]
    loss_sum = chunk.loss_sum
    if engine.groups.rank < dist.get_world_size() - 1:
        yield
        return

    def poisoned(hidden: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        # Not the sum itself: the fused loss has its gradients by then.
        return loss_sum(hidden * NAN, *args, **keywords)

    with mock.patch.object(chunk, "loss_sum", poisoned):
        yield


@contextlib.contextmanager
def nan_in_embeddings(engine: TrainEngine) -> Iterator[None]:
    """One number of what rank 0 encodes."""
    encode = engine.vision.encode

    def poisoned(*args: Any, **keywords: Any) -> torch.Tensor:
        out_NTH = encode(*args, **keywords)
        if engine.groups.rank == 0:
            out_NTH[0, 0, 0] = NAN
        return out_NTH

    with mock.patch.object(engine.vision, "encode", poisoned):
        yield


@contextlib.contextmanager
def nan_in_vision_gradient(engine: TrainEngine) -> Iterator[None]:
    """One gradient on rank 1; the loss is finite."""
    backward = engine.vision.backward

    def poisoned(gradients_NTH: torch.Tensor) -> None:
        if engine.groups.rank == 1:
            gradients_NTH[0, 0, 0] = NAN
        backward(gradients_NTH)

    with mock.patch.object(engine.vision, "backward", poisoned):
        yield


POISONS = {
    "loss": nan_in_loss,
    "embeddings": nan_in_embeddings,
    "vision gradient": nan_in_vision_gradient,
}


def snapshot(engine: TrainEngine) -> list[torch.Tensor]:
    """Copies of this rank's weights, master weights and optimizer states, bit by bit."""
    modules = [*engine.parts.chunks, engine.parts.encoder]
    # ZeRO-3 keeps its part of a weight in `ds_tensor`; the parameter itself is empty or gathered,
    # as it comes.
    tensors = [
        getattr(p, "ds_tensor", p.detach()) for module in modules for p in module.parameters()
    ]
    for zero in engine.engines:
        tensors += [zero.weight(p) for p in zero.trained]
        adamw = getattr(zero.optimizer, "optimizer", zero.optimizer)
        tensors += [p.detach() for group in adamw.param_groups for p in group["params"]]
        states = [state for state in adamw.state.values() if state]
        tensors += [value for state in states for value in state.values() if torch.is_tensor(value)]
    return [tensor.clone() for tensor in tensors]


def measure_skips(lab: Lab, layout: Layout) -> dict[str, Any]:
    """One good step, a bad one of each kind, then the other good ones; a row of JSON."""
    case = lab.case(layout)
    truth = lab.truths[case.problem]
    engine = lab.engine(case)
    results = [engine.step(lab.batch(engine, case, 0), step=0)]
    skipped, unchanged, finite_loss = {}, {}, {}
    for name, poison in POISONS.items():
        before = snapshot(engine)
        with poison(engine):
            # The data of a later step: its traces would show.
            bad = engine.step(lab.batch(engine, case, 2), step=1)
        after = snapshot(engine)
        same = len(before) == len(after) and all(
            torch.equal(a, b) for a, b in zip(before, after, strict=True)
        )
        skipped[name], unchanged[name] = _everywhere(bad.skipped), _everywhere(same)
        finite_loss[name] = bad.loss == bad.loss
    for step in range(1, STEPS):
        results.append(engine.step(lab.batch(engine, case, step), step=step))
    weights = weight_errors(engine, truth)
    return {
        "skipped": skipped,
        "unchanged": unchanged,
        "finite_loss": finite_loss,
        "good_skipped": any(result.skipped for result in results),
        "weight_error": worst(weights.items())[1],
        "loss_error": worst(
            (step, abs(results[step].loss - t) / t) for step, t in enumerate(truth.losses)
        )[1],
        "norm_error": worst(
            (step, abs(results[step].grad_norm - t) / t) for step, t in enumerate(truth.norms)
        )[1],
    }


def measure_kept_gradients(lab: Lab, layout: Layout) -> dict[str, Any]:
    """As `measure_skips`, but DeepSpeed is not told that a skipped step is over."""

    def clear_alone(zero: ZeroEngine) -> None:
        zero.optimizer.zero_grad(set_to_none=True)

    with mock.patch.object(ZeroEngine, "discard", clear_alone):
        return measure_skips(lab, layout)


def _everywhere(fact: bool) -> bool:
    votes = torch.tensor([float(fact)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())
