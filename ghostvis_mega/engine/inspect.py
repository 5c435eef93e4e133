"""Comparing what a layout holds with whole tensors of a reference, without gathering the model
anywhere."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.shards import shard

ROUNDING = 1e-6
"""Share of the joint norm below which a tensor counts as rounding noise of exact zeros."""


def owned_parameters(engine: TrainEngine) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's LLM parameters and the encoder's, under global names, in an order that replicas
    share."""
    for chunk in engine.parts.chunks:
        yield from chunk.global_parameters()
    if engine.parts.encoder is not None:
        yield from engine.parts.encoder.named_parameters()


def reduced_gradient(engine: TrainEngine) -> Callable[[nn.Parameter], torch.Tensor | None]:
    """A function that returns a parameter's averaged gradient; collective, between reduction and
    update."""
    owners = {id(p): zero for zero in engine.engines for p in zero.trained}

    def gradient(parameter: nn.Parameter) -> torch.Tensor | None:
        zero = owners.get(id(parameter))
        return None if zero is None else zero.gradient(parameter)

    return gradient


def relative_errors(
    engine: TrainEngine,
    reference: Mapping[str, torch.Tensor],
    value: Callable[[nn.Parameter], torch.Tensor | None],
) -> dict[str, float]:
    """Relative L2 distance to the reference, for each parameter that the reference names.

    Args:
        engine: The layout.
        reference: Whole tensors by global name.
        value: What to compare of a parameter; None leaves it out. Called on all ranks in the same
            order.

    Returns:
        Errors by name, equal on all ranks. A reference tensor that is zero but for rounding, below
        `ROUNDING` of the joint norm (a key bias: attention does not depend on it), is compared in
        units of the joint norm; where all are zero the distance itself counts.
    """
    return relative(square_distances(engine, reference, value))


def square_distances(
    engine: TrainEngine,
    reference: Mapping[str, torch.Tensor],
    value: Callable[[nn.Parameter], torch.Tensor | None],
) -> dict[str, tuple[float, float]]:
    """Square of the L2 distance to the reference, and of the reference's own norm, by name.

    Args:
        engine: The layout.
        reference: Whole tensors by global name.
        value: As for `relative_errors`.
    """
    names = sorted(reference)
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=engine.device)
    position = {name: index for index, name in enumerate(names)}
    groups = engine.groups
    llm_parameters = {id(p) for chunk in engine.parts.chunks for p in chunk.parameters()}
    for name, parameter in owned_parameters(engine):
        mine = value(parameter)
        if mine is None or name not in position:
            continue
        in_llm = id(parameter) in llm_parameters
        cut = in_llm and getattr(parameter, "tensor_model_parallel", False)
        first_copy = (
            groups.data.rank() == 0 and (cut or groups.place.tensor == 0)
            if in_llm
            else groups.rank == 0
        )
        if not first_copy or getattr(parameter, "ds_pipe_replicated", False):
            continue
        whole = reference[name]
        gated = engine.run.model.llm.activation == "swiglu"
        size, rank = (groups.degrees.tensor, groups.place.tensor) if cut else (1, 0)
        true = shard(whole, name, size=size, rank=rank, gated=gated).to(
            engine.device, torch.float64
        )
        difference = mine.detach().to(torch.float64).view_as(true) - true
        sums[position[name]] = torch.stack(
            [
                difference.square().sum(),
                true.square().sum(),
                torch.ones((), device=engine.device).double(),
            ]
        )
    dist.all_reduce(sums, group=groups.world)
    missing = [name for name, row in zip(names, sums.tolist(), strict=True) if row[2] == 0]
    if missing:
        raise KeyError(
            f"no rank holds {missing[0]} ({len(missing)} names of the reference are unknown)"
        )
    return {name: (row[0], row[1]) for name, row in zip(names, sums.tolist(), strict=True)}


def relative(squares: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Errors from squares of distances and of what they are relative to; see `relative_errors`."""
    joint = sum(true for _, true in squares.values()) or 1.0
    return {
        name: (distance / (true if true > ROUNDING**2 * joint else joint)) ** 0.5
        for name, (distance, true) in squares.items()
    }


def rounding_only(squares: Mapping[str, float]) -> set[str]:
    """Names of tensors that are zero but for rounding beside the joint norm of all.

    Args:
        squares: Sum of squares of each tensor.
    """
    joint = sum(squares.values())
    return {name for name, square in squares.items() if square <= ROUNDING**2 * joint}
