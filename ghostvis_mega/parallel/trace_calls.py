"""What a call to other ranks is, read from the arguments of torch's `ProcessGroup` methods."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_PASSED_OVER = (
    "torch/distributed/",
    "deepspeed/comm/",
    "contextlib.py",
    "typing_extensions.py",
    "ghostvis_mega/parallel/trace",
    "ghostvis_mega/parallel/calls.py",
    "ghostvis_mega/utils/launch.py",
)
"""Files whose lines say nothing about why a call was made."""
_REDUCTIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")

# How a method says what it moves: (name in messages, position of the tensors that are alike on all
# members). Names of several torch versions; a trace takes those that this one has.
_COLLECTIVES: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce_coalesced", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather_coalesced", 0),
    "_allgather_base": ("all_gather_into_tensor", 0),
    "all_gather_single": ("all_gather_into_tensor", 0),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor_coalesced", 0),
    "all_gather_single_coalesced": ("all_gather_into_tensor_coalesced", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 1),
    "reduce_scatter_single": ("reduce_scatter_tensor", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor_coalesced", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter_tensor_coalesced", 1),
    "gather": ("gather", 1),
    "gather_single": ("gather_into_tensor", 1),
    "gather_into_tensor": ("gather_into_tensor", 1),
    "scatter": ("scatter", 0),
}
_EXCHANGES = ("alltoall", "alltoall_base", "all_to_all_single")
_BARRIERS = ("barrier", "monitored_barrier")
_SENDS = ("send",)
_RECEIVES = ("recv", "recv_anysource")
POINT_TO_POINT = (*_SENDS, *_RECEIVES)
"""Methods of `ProcessGroup` that reach one other rank."""
TRACED = (*_COLLECTIVES, *_EXCHANGES, *_BARRIERS, *_SENDS, *_RECEIVES)
"""Methods of `ProcessGroup` that move data or wait for others."""


class Described(NamedTuple):
    """One call in words."""

    what: str
    collective: bool
    """Made by all members of the group."""
    sent: list[tuple[int, str]]
    """(global rank, elements) of each part that this rank gives."""
    received: list[tuple[int, str]]


def describe_call(name: str, args: tuple[Any, ...], ranks: Sequence[int]) -> Described:
    """A call of `ProcessGroup.NAME` in a group of these global ranks."""
    if name in _SENDS or name in _RECEIVES:
        tensors = _tensors(args[0])
        amount = f"{'+'.join(str(tensor.numel()) for tensor in tensors)} {_dtypes(tensors)}"
        if name == "recv_anysource":
            return Described(f"recv of {amount} from any rank", False, [], [])
        peer = ranks[args[1]]
        if name in _SENDS:
            return Described(f"send of {amount} to rank {peer}", False, [(peer, amount)], [])
        return Described(f"recv of {amount} from rank {peer}", False, [], [(peer, amount)])
    if name in _BARRIERS:
        return Described("barrier", True, [], [])
    if name in _EXCHANGES:
        received, sent = _exchanged(name, args, size=len(ranks))
        return Described(
            f"all_to_all of {_dtypes(_tensors(args[0]))}",
            True,
            list(zip(ranks, sent, strict=True)),
            list(zip(ranks, received, strict=True)),
        )
    shown, position = _COLLECTIVES[name]
    tensors = _tensors(args[position])
    sizes = "+".join(str(tensor.numel()) for tensor in tensors)
    return Described(f"{shown} of {sizes} {_dtypes(tensors)}{_options(args, ranks)}", True, [], [])


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an argument: one, a list, or a list of lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]


def _dtypes(tensors: Sequence[torch.Tensor]) -> str:
    names = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return "+".join(names) or "nothing"


def _options(args: tuple[Any, ...], ranks: Sequence[int]) -> str:
    """The reduction or the root, as they stand in the options or by themselves."""
    told = []
    for option in args[1:]:
        reduction = option if isinstance(option, dist.ReduceOp) else None
        reduction = getattr(option, "reduceOp", reduction)
        if reduction is not None:
            known = (name for name in _REDUCTIONS if reduction == getattr(dist.ReduceOp, name))
            told.append(next(known, "another reduction"))
        if hasattr(option, "rootRank"):
            told.append(f"root rank {ranks[option.rootRank]}")
    return f" ({', '.join(told)})" if told else ""


def _exchanged(name: str, args: tuple[Any, ...], *, size: int) -> tuple[list[str], list[str]]:
    """Elements from and to each rank of an all-to-all."""
    output, given = args[0], args[1]
    if name == "alltoall":
        return [str(part.numel()) for part in output], [str(part.numel()) for part in given]
    amounts = []
    for tensor, splits in ((output, args[2]), (given, args[3])):
        rows = tensor.shape[0] if tensor.dim() else 1
        width = tensor.numel() // rows if rows else 0
        amounts.append([str(n * width) for n in splits or [rows // size] * size])
    return amounts[0], amounts[1]


_FILES: dict[str, tuple[bool, bool]] = {}
"""By path: whether a file is passed over, and whether it is ours."""


def caller() -> str:
    """The line that makes the call, and the line of ours that led there."""
    frame = sys._getframe(1)
    first = ""
    while frame is not None:
        path = frame.f_code.co_filename
        kind = _FILES.get(path)
        if kind is None:
            kind = any(part in path for part in _PASSED_OVER), "ghostvis_mega/" in path
            _FILES[path] = kind
        passed_over, ours = kind
        if not passed_over:
            place = f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}"
            if ours:
                return f"{first}, from {place}" if first else place
            first = first or place
        frame = frame.f_back
    return first
