"""How ranks that share each layer (tensor parallelism) put their parts together."""

from typing import Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """The ranks that together hold the language model once."""

    size: int
    rank: int

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, on each of them."""
        ...

    def join(self, x_RV: torch.Tensor) -> torch.Tensor:
        """All ranks' columns side by side, on each of them."""
        ...


class Alone:
    """One process."""

    size, rank = 1, 0

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """The only part is the sum."""
        return x

    def join(self, x_RV: torch.Tensor) -> torch.Tensor:
        """The only part is the whole."""
        return x_RV


class TensorRanks:
    """The ranks of a process group (gloo on CPUs, NCCL on GPUs)."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.size, self.rank = group.size(), group.rank()

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Sum in place."""
        dist.all_reduce(x, group=self._group)
        return x

    def join(self, x_RV: torch.Tensor) -> torch.Tensor:
        """Gather columns."""
        parts = [torch.empty_like(x_RV) for _ in range(self.size)]
        dist.all_gather(parts, x_RV.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)


def join_ranks(device: torch.device) -> TensorRanks:
    """Meet the other processes that a launcher has started, all of which share the model."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = dist.group.WORLD
    assert group is not None
    return TensorRanks(group)


def leave_ranks() -> None:
    """Part from them after the work, for this process is about to end."""
    dist.destroy_process_group()
