"""Gradients that are missing are zeros in the type that they are summed in."""

import torch
from torch import nn

from ghostvis_mega.engine.finish import fill_missing_gradients


def test_missing_gradients_become_zeros_and_others_stay() -> None:
    unused, used, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    used.grad = torch.full((3,), 2.0)
    fill_missing_gradients([unused, used, frozen])
    assert torch.equal(unused.grad, torch.zeros(3))
    assert torch.equal(used.grad, torch.full((3,), 2.0))
    assert frozen.grad is None


def test_bf16_parameters_get_fp32_zeros() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    fill_missing_gradients([parameter])
    assert parameter.grad.dtype == torch.float32
    (parameter * 2.0).sum().backward()
    assert parameter.grad.dtype == torch.float32
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))
