"""Gradients as one buffer a group: their places, and that none leaves its place unseen."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ghostvis_mega.engine.flat_gradients import FlatGradients


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What DeepSpeed's optimizer tells of two groups of parameters, on rank 1 of 2: the second
    parameter is cut by the partitions, and three elements of padding follow it."""
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    first = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(9))]
    second = [nn.Parameter(torch.zeros(4))]
    numbers = {id(p): n for n, p in enumerate([*first, *second])}
    return SimpleNamespace(
        bit16_groups_flat=[torch.zeros(18), torch.zeros(4)],
        round_robin_bit16_groups=[first, second],
        round_robin_bit16_offsets=[[0, 6], [0]],
        real_dp_process_group=["data", "data"],
        partition_size=[9, 2],
        params_in_partition=[[first[1]], second],
        grad_start_offset=[{1: {1: 3}}, {1: {2: 2}}],
        grad_partition_insertion_offset=[{1: {1: 0}}, {1: {2: 0}}],
        get_param_id=lambda p: numbers[id(p)],
        averaged_gradients={},
        _grad_acc_hooks=[],
    )


def test_backward_passes_add_up_where_the_partition_lies(optimizer: Any) -> None:
    flat = FlatGradients(optimizer)
    (one, two), (three,) = optimizer.round_robin_bit16_groups
    flat.begin(fused=True)
    for _ in range(2):
        (two * torch.arange(9.0)).sum().backward()
        (one.sum() + (three * 5).sum()).backward()
    one.main_grad += 10
    flat.end()
    flat.wait()
    assert one.grad is two.grad is three.grad is None and not hasattr(one, "main_grad")
    assert flat.totals[0].tolist() == [12.0] * 6 + [2.0 * n for n in range(9)] + [0.0] * 3
    mine = optimizer.averaged_gradients[0]
    assert mine.flat_partition.tolist() == [6, 8, 10, 12, 14, 16, 0, 0, 0]
    assert [view.tolist() for view in mine] == [[6, 8, 10, 12, 14, 16], [0, 0, 0]]
    assert [getattr(view, "_zero_padding", False) for view in mine] == [False, True]
    assert mine[0].data_ptr() == flat.totals[0][9:].data_ptr(), "no copy"
    assert optimizer.averaged_gradients[1].flat_partition.tolist() == [10, 10]
    flat.begin(fused=False)
    assert not flat.totals[0].any() and not hasattr(one, "main_grad")


@pytest.mark.parametrize("left", [None, torch.ones(9)])
def test_a_gradient_that_left_its_place_stops_the_run(
    optimizer: Any, left: torch.Tensor | None
) -> None:
    flat = FlatGradients(optimizer)
    flat.begin(fused=False)
    optimizer.round_robin_bit16_groups[0][1].grad = left
    with pytest.raises(RuntimeError, match=r"a parameter \(9,\) left its place"):
        flat.end()
