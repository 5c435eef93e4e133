"""The calls to Transformer Engine, by an imitation of its functions that computes with PyTorch's.

Whether the imitation is right is shown on GPUs, by test_vision_layer_on_gpu.py.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ghostvis_mega.model.vision_kernels import ACTIVATIONS, EngineKernels, PlainKernels


def general_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    layout: str = "TN",
    bias: torch.Tensor | None = None,
    gelu: bool = False,
    gelu_in: torch.Tensor | None = None,
    grad: bool = False,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """As in Transformer Engine 2.20: for row-major matrices `layout` says which product it is."""
    product = {"TN": lambda: b @ a.t(), "NN": lambda: b @ a, "NT": lambda: b.t() @ a}[layout]()
    if grad and layout == "NN":
        assert bias is None, "biases are of products forward and of weight gradients"
        if gelu:
            assert gelu_in is not None
            with torch.enable_grad():
                given = gelu_in.detach().requires_grad_()
                activated = F.gelu(given, approximate="tanh")
            product = torch.autograd.grad(activated, given, product)[0]
        return product.to(out_dtype), None, None, None
    if grad:
        assert accumulate == (out is not None)
        assert bias is not None
        product = product.to(out_dtype)
        return out.add_(product) if out is not None else product, b.sum(0), None, None
    product = (product + bias).to(out_dtype)
    if gelu:
        return F.gelu(product, approximate="tanh"), None, product, None
    return product, None, None, None


def layernorm_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: Any) -> Any:
    eps, out, quantizer, dtype, margin, centred = rest
    assert (out, quantizer, dtype, margin, centred) == (None, None, "fp32", 0, False)
    return PlainKernels().norm(x, weight, bias, eps=eps)


def layernorm_bwd(d: torch.Tensor, x: torch.Tensor, *rest: Any) -> Any:
    mean, deviation, weight, margin, centred = rest
    assert (margin, centred) == (0, False)
    return PlainKernels().norm_backward(d, x, (x, mean, deviation), weight)


def qgelu(x: torch.Tensor, quantizer: None) -> torch.Tensor:
    return ACTIVATIONS["quick_gelu"](x)


def dqgelu(d: torch.Tensor, x: torch.Tensor, quantizer: None) -> torch.Tensor:
    s = torch.sigmoid(1.702 * x)
    return d * (s + 1.702 * x * s * (1 - s))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> EngineKernels:
    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.constants": {"TE_DType": {torch.float32: "fp32"}},
        "transformer_engine.pytorch.cpp_extensions": {"general_gemm": general_gemm},
        "transformer_engine_torch": {
            f.__name__: f for f in (layernorm_fwd, layernorm_bwd, qgelu, dqgelu)
        },
    }
    for name, members in contents.items():
        module = ModuleType(name)
        for member, value in members.items():
            setattr(module, member, value)
        monkeypatch.setitem(sys.modules, name, module)
    return EngineKernels()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_call_is_what_pytorch_computes(kernels: EngineKernels, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, other, weight, back = (
        torch.randn(shape, generator=generator) for shape in ((6, 8), (6, 16), (16, 8), (8, 16))
    )
    bias, scale, shift = (torch.randn(n, generator=generator) for n in (16, 8, 8))
    plain, found = PlainKernels(), []
    for own in (kernels, plain):
        norm = own.norm(rows, scale, shift, eps=1e-6)
        activated, before = own.linear_activated(rows, weight, bias, name=name)
        total = torch.ones(16, 8)
        assert own.weight_gradient(other, rows, bias, total)[0] is None
        found.append(
            (
                *norm,
                *own.norm_backward(rows.flip(0), rows, norm, scale),
                *(own.linear(rows, weight, bias), activated, before),
                own.input_gradient(other, weight),
                own.activated_gradient(rows, back, before, name=name),
                *own.weight_gradient(other, rows, bias, None),
                total,
            )
        )
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth)


def test_an_unknown_activation_is_no_gelu(kernels: EngineKernels) -> None:
    with pytest.raises(KeyError, match="relu"):
        kernels.linear_activated(torch.ones(2, 8), torch.ones(8, 8), torch.ones(8), name="relu")
