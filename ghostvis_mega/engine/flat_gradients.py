"""Gradients of ZeRO stage 1 and 2 as one fp32 buffer a parameter group, reduced in one piece.

DeepSpeed 0.19 reduces parameter by parameter: a Python hook at each accumulation, a copy into a
bucket, one out of it, and a flattening before the update, most of it while the GPU waits. Here a
buffer is laid out as DeepSpeed lays out the group's weights, so that a rank's partition is a
contiguous part of it: one reduce-scatter, in place, leaves what DeepSpeed's optimizer updates from,
without a copy. DeepSpeed takes it as the partition that its own compact gradient buffers are.
"""

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import nn


class FlatGradients:
    """The gradients of one engine, all in fp32.

    Args:
        optimizer: Of DeepSpeed, stage 1 or 2, without offload. Its hooks are removed.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer):
        self.optimizer = optimizer
        self.totals: list[torch.Tensor] = []
        """By parameter group: fp32 [its elements, padding included]."""
        self.groups = list(optimizer.real_dp_process_group)
        """By parameter group: whose gradients are averaged."""
        self._views: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._partitions: list[GradPartitionBufferGroup] = []
        self._waiting: list[dist.Work] = []
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks.clear()
        for index, flat in enumerate(optimizer.bit16_groups_flat):
            total = torch.zeros(flat.numel(), dtype=torch.float32, device=flat.device)
            self.totals.append(total)
            for parameter, offset in zip(
                optimizer.round_robin_bit16_groups[index],
                optimizer.round_robin_bit16_offsets[index],
                strict=True,
            ):
                view = total[offset : offset + parameter.numel()].view(parameter.shape)
                self._views.append((parameter, view))
            self._partitions.append(self._partition(index))

    def begin(self, *, fused: bool) -> None:
        """Zero the sums and let backward passes add to them.

        Args:
            fused: Modules find the sum as `main_grad` as well, and add to it in their GEMM. It is
                the parameter's `.grad` itself, so that what autograd adds goes to the same numbers;
                Transformer Engine returns nothing for a weight without the attribute
                `grad_added_to_main_grad`, so nothing is added twice.
        """
        torch._foreach_zero_(self.totals)
        for parameter, view in self._views:
            parameter.grad = view
            if fused:
                parameter.main_grad = view

    def end(self) -> None:
        """No backward pass follows.

        Raises:
            RuntimeError: A gradient is no longer where it was summed.
        """
        for parameter, view in self._views:
            if parameter.grad is None or parameter.grad.data_ptr() != view.data_ptr():
                shape = tuple(parameter.shape)
                raise RuntimeError(f"the gradient of a parameter {shape} left its place in the sum")
            parameter.grad = None
            if hasattr(parameter, "main_grad"):
                del parameter.main_grad

    def reduce(self) -> None:
        """Begin to average over data parallelism; `wait` ends it."""
        for total, group, own in zip(self.totals, self.groups, self._partitions, strict=True):
            if dist.get_world_size(group) > 1:
                self._waiting.append(_reduce_scatter(own.flat_partition, total, group))

    def wait(self) -> None:
        """Hand the averages to DeepSpeed's optimizer, once they are there."""
        for work in self._waiting:
            work.wait()
        self._waiting.clear()
        for index, partition in enumerate(self._partitions):
            self.optimizer.averaged_gradients[index] = partition

    def _partition(self, index: int) -> GradPartitionBufferGroup:
        """Views of this rank's part of a group, as DeepSpeed's own partition has them: one for each
        parameter that lies in it, and those of the padding between."""
        optimizer = self.optimizer
        rank = dist.get_rank(self.groups[index])
        size = int(optimizer.partition_size[index])
        flat = self.totals[index][rank * size : (rank + 1) * size]
        views, done = [], 0

        def padding(until: int) -> None:
            if until > done:
                view = flat[done:until]
                view._zero_padding = True
                views.append(view)

        for parameter in optimizer.params_in_partition[index]:
            number = optimizer.get_param_id(parameter)
            source = int(optimizer.grad_start_offset[index][rank][number])
            place = int(optimizer.grad_partition_insertion_offset[index][rank][number])
            count = min(parameter.numel() - source, size - place)
            padding(place)
            view = flat[place : place + count]
            views.append(view.view(parameter.shape) if count == parameter.numel() else view)
            done = place + count
        padding(size)
        return GradPartitionBufferGroup(views, flat)


def _reduce_scatter(own: torch.Tensor, total: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    # PyTorch 2.14 renamed it.
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(own, total, op=dist.ReduceOp.AVG, group=group, async_op=True)
