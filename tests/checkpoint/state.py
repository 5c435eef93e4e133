"""All that training changes, read straight from modules and DeepSpeed, not by our own mapping."""

import torch
import torch.distributed as dist

from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.engine.zero import ZeroEngine

State = dict[str, torch.Tensor]


def raw_state(engine: TrainEngine) -> State:
    """Copies of weights, flat buffers, masters and AdamW's state of this rank, by name."""
    state: State = {}
    for number, chunk in enumerate(engine.parts.chunks):
        state |= {f"chunk{number}.{name}": p for name, p in chunk.named_parameters()}
    state |= {f"encoder.{name}": p for name, p in engine.parts.encoder.named_parameters()}
    for number, zero in enumerate(engine.engines):
        state |= {f"zero{number}.{name}": t for name, t in raw_zero(zero).items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def raw_zero(zero: ZeroEngine) -> State:
    optimizer = zero.optimizer
    if zero.stage == 0:
        masters, lows, adamw = zero.trained, [], optimizer
    elif zero.stage == 3:
        masters, lows = optimizer.fp32_partitioned_groups_flat, [optimizer.lp_param_buffer]
        adamw = optimizer.optimizer
    else:
        masters, lows = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat
        adamw = optimizer.optimizer
    state = {f"master{i}": t for i, t in enumerate(masters)}
    state |= {f"low{i}": t for i, t in enumerate(lows)}
    for i, master in enumerate(masters):
        state |= {f"adam{i}.{key}": value for key, value in adamw.state[master].items()}
    return state


def differing(one: State, other: State) -> list[str]:
    """Names of tensors that differ in any bit."""
    assert one.keys() == other.keys()
    return [
        name
        for name, tensor in one.items()
        if tensor.shape != other[name].shape
        or not torch.equal(
            tensor.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)
        )
    ]


def buffers_agree(engine: TrainEngine) -> bool:
    """Parameters are views of DeepSpeed's flat buffers, which are the masters rounded."""
    for zero in engine.engines:
        if zero.stage == 3 and not _zero3_agrees(zero):
            return False
        if zero.stage not in (1, 2):
            continue
        optimizer, rank = zero.optimizer, dist.get_rank(zero.grid.get_data_parallel_group())
        for index, flat in enumerate(optimizer.bit16_groups_flat):
            part = optimizer.parallel_partitioned_bit16_groups[index][rank]
            if not torch.equal(part, optimizer.single_partition_of_fp32_groups[index].to(part)):
                return False
            begin = flat.data_ptr()
            end = begin + flat.numel() * flat.element_size()
            if not all(begin <= p.data_ptr() < end for p in optimizer.bit16_groups[index]):
                return False
    return True


def _zero3_agrees(zero: ZeroEngine) -> bool:
    """The parts that DeepSpeed gathers are the masters rounded."""
    flats = zero.optimizer.fp16_partitioned_groups_flat
    masters = zero.optimizer.fp32_partitioned_groups_flat
    return all(torch.equal(a, b.to(a)) for a, b in zip(flats, masters, strict=True))
