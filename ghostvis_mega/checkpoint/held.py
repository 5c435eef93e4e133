"""What one rank holds of each parameter: which elements, who saves them, and the optimizer's share.

This is the one place that knows where DeepSpeed 0.19 keeps things:
stage 0    torch's AdamW on the parameters themselves.
stage 1/2  `single_partition_of_fp32_groups[group]`, one flat fp32 partition of each AdamW group;
           parameters are views of flat buffers, so writing a parameter writes those too.
stage 3    `fp32_partitioned_groups_flat[i]`; a parameter's own elements are in `ds_tensor`, a view
           of the same memory where the model is fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ghostvis_mega.checkpoint.manifest import MOMENTS
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.engine.zero import ZeroEngine
from ghostvis_mega.model.shards import partition_dim
from ghostvis_mega.parallel.groups import Groups


@dataclass(frozen=True)
class Span:
    """Elements of this rank's tensor-parallel part of a parameter, as views of the live state."""

    start: int
    tensors: dict[str, torch.Tensor]
    """By kind, all of one length: `weight`, or `master` and the moments."""

    @property
    def length(self) -> int:
        """Number of elements."""
        return next(iter(self.tensors.values())).numel()


@dataclass(frozen=True)
class Held:
    """One parameter on this rank."""

    name: str
    """Global name."""
    parameter: nn.Parameter
    zero: ZeroEngine | None
    """The engine that trains it; None where it is frozen."""
    in_llm: bool
    cut: bool
    """Whether tensor-parallel ranks share it out."""
    tensor_rank: int
    """Which part this is; 0 where it is not cut."""
    replica: int
    """Number among the ranks that hold the same elements, ZeRO's cuts left aside; 0 saves."""

    @property
    def shape(self) -> list[int]:
        """Of this rank's tensor-parallel part; ZeRO-3 empties the parameter itself."""
        return list(getattr(self.parameter, "ds_shape", self.parameter.shape))


def held_parameters(engine: TrainEngine) -> Iterator[Held]:
    """All parameters of this rank; a later stage's tied head is one more copy of the embedding."""
    groups = engine.groups
    owners = {id(p): zero for zero in engine.engines for p in zero.trained}
    for chunk in engine.parts.chunks:
        for name, parameter in chunk.global_parameters():
            cut = partition_dim(name) is not None
            yield Held(
                name=name,
                parameter=parameter,
                zero=owners.get(id(parameter)),
                in_llm=True,
                cut=cut,
                tensor_rank=groups.place.tensor if cut else 0,
                replica=_llm_replica(parameter, groups, cut=cut),
            )
    if engine.parts.encoder is not None:
        for name, parameter in engine.parts.encoder.named_parameters():
            yield Held(
                name=name,
                parameter=parameter,
                zero=owners.get(id(parameter)),
                in_llm=False,
                cut=False,
                tensor_rank=0,
                replica=groups.rank,
            )


def _llm_replica(parameter: nn.Parameter, groups: Groups, *, cut: bool) -> int:
    """Copies over tensor ranks and stages come after all data-parallel ones."""
    other_copy = getattr(parameter, "ds_pipe_replicated", False)
    if other_copy or (not cut and groups.place.tensor > 0):
        return groups.degrees.world_size
    return dist.get_rank(groups.data)


def saves_weight(held: Held) -> bool:
    """Whether this rank is the one that saves its elements of the weight."""
    return held.replica < _sharers(held.parameter)


def saves_optimizer_state(held: Held) -> bool:
    """Whether this rank is the one that saves its elements of masters and moments."""
    if held.zero is None:
        return False
    sharers = held.zero.grid.get_data_parallel_world_size() if held.zero.stage > 0 else 1
    return held.replica < sharers


def _sharers(parameter: nn.Parameter) -> int:
    """Data-parallel ranks that hold different elements of a weight: those of ZeRO-3, else one."""
    if not hasattr(parameter, "ds_tensor"):
        return 1
    return dist.get_world_size(parameter.ds_process_group)


def weight_span(held: Held) -> Span | None:
    """The elements of the weight that are on this rank; None where ZeRO-3 left it none."""
    partition = getattr(held.parameter, "ds_tensor", None)
    if partition is None:
        return Span(0, {"weight": held.parameter.data.view(-1)})
    return _own_part(held.parameter, {"weight": partition.data.view(-1)})


def optimizer_span(held: Held) -> Span | None:
    """The elements whose optimizer state is on this rank; None where it has none of them.

    AdamW makes its state at its first update; what does not exist yet is made here, as zeros.
    """
    zero, parameter = held.zero, held.parameter
    if zero is None:
        return None
    if zero.stage == 0:
        return Span(0, _adam_tensors(zero, parameter))
    if zero.stage == 3:
        index, offset, length = zero.optimizer.grad_position[zero.optimizer.get_param_id(parameter)]
        flat = zero.optimizer.fp32_partitioned_groups_flat[index]
        tensors = _adam_tensors(zero, flat)
        return _own_part(
            parameter, {kind: t.narrow(0, offset, length) for kind, t in tensors.items()}
        )
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = zero.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    place = mapping.hp_fragment_address
    tensors = _adam_tensors(zero, flat)
    return Span(
        mapping.lp_fragment_address.start,
        {kind: t.narrow(0, place.start, place.numel) for kind, t in tensors.items()},
    )


def _own_part(parameter: nn.Parameter, padded: dict[str, torch.Tensor]) -> Span | None:
    """ZeRO-3 gives every rank equally many elements of each parameter; the last may be padding."""
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank(parameter.ds_process_group) * size
    length = min(size, parameter.ds_numel - start)
    if length <= 0:
        return None
    return Span(start, {kind: tensor.narrow(0, 0, length) for kind, tensor in padded.items()})


def _adam_tensors(zero: ZeroEngine, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    state = _adam_state(zero, flat)
    return {"master": flat.data.view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS}


def _adam_state(zero: ZeroEngine, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    adamw = _adamw(zero)
    state = adamw.state[flat]
    if not state:
        on_device = adamw.defaults["fused"] or adamw.defaults["capturable"]
        state["step"] = torch.zeros((), device=flat.device if on_device else "cpu")
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(flat, requires_grad=False)
    return state


def _adamw(zero: ZeroEngine) -> torch.optim.AdamW:
    return zero.optimizer if zero.stage == 0 else zero.optimizer.optimizer


def _optimized(zero: ZeroEngine) -> list[torch.Tensor]:
    """The tensors that AdamW updates on this rank."""
    if zero.stage == 0:
        return zero.trained
    if zero.stage == 3:
        return zero.optimizer.fp32_partitioned_groups_flat
    return zero.optimizer.single_partition_of_fp32_groups


def optimizer_steps(zero: ZeroEngine) -> int:
    """Updates that AdamW made; a skipped step is none, for any parameter."""
    steps = {int(_adam_state(zero, flat)["step"]) for flat in _optimized(zero)}
    assert len(steps) == 1, f"parameters of one engine were updated {sorted(steps)} times"
    return steps.pop()


def set_optimizer_steps(zero: ZeroEngine, steps: int) -> None:
    """Let AdamW's bias correction go on after `steps` updates."""
    for flat in _optimized(zero):
        _adam_state(zero, flat)["step"].fill_(steps)


def release_gathered(zero: ZeroEngine) -> None:
    """Before weights are set: whole copies of ZeRO-3 parameters would not see the new values."""
    if zero.stage == 3:
        zero.optimizer._partition_all_parameters()


def gather_persistent(zero: ZeroEngine) -> None:
    """After it: small ZeRO-3 parameters stay whole on every rank; collective."""
    if zero.stage == 3 and zero.optimizer.persistent_parameters:
        zero.optimizer.persistent_parameters[0].all_gather(zero.optimizer.persistent_parameters)
