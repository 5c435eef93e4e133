"""The shim changes what Megatron-Core sees of torch, nothing else, and says so when it cannot."""

import importlib
import re

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from ghostvis_mega.parallel.cpu_shim import ASKS_FOR_CUDA, REPLACED, apply_cpu_shim

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the shim is for machines without CUDA"
)
BEFORE = {
    f"cuda.{name}": getattr(torch.cuda, name)
    for name in ("current_device", "synchronize", "manual_seed", "get_rng_state")
} | {name: getattr(torch, name) for name in ("zeros", "empty", "ones", "tensor")}
"""torch as it was when this file was imported."""


def test_torch_itself_stays_as_it_is() -> None:
    assert apply_cpu_shim()
    for name, original in BEFORE.items():
        owner, _, function = name.rpartition(".")
        assert getattr(torch.cuda if owner else torch, function) is original, name
        assert not owner or original.__module__.startswith("torch.cuda"), name
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize("name", ASKS_FOR_CUDA)
def test_megatron_sees_a_cpu(name: str) -> None:
    assert apply_cpu_shim()
    seen = importlib.import_module(name).torch
    assert seen.cuda.current_device() == torch.device("cpu")
    assert seen.zeros([], device="cuda").device == torch.device("cpu")
    assert seen.empty(2, device=seen.cuda.current_device()).device == torch.device("cpu")
    assert seen.cuda.synchronize() is None
    # Everything else is torch's own.
    assert seen.nn is torch.nn
    assert seen.cuda.is_available is torch.cuda.is_available
    assert isinstance(seen.ones(1), torch.Tensor)


def test_random_state_is_the_cpus() -> None:
    assert apply_cpu_shim()
    state = megatron_random._get_cuda_rng_state()
    first = torch.rand(3)
    megatron_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_applying_twice_changes_nothing_more() -> None:
    assert apply_cpu_shim()
    seen = importlib.import_module(ASKS_FOR_CUDA[0]).torch
    assert apply_cpu_shim()
    assert importlib.import_module(ASKS_FOR_CUDA[0]).torch is seen


@pytest.mark.parametrize(
    ("module", "symbol"),
    [(name, symbol) for name, symbols in REPLACED.items() for symbol in symbols],
)
def test_missing_function_raises(monkeypatch: pytest.MonkeyPatch, module: str, symbol: str) -> None:
    monkeypatch.delattr(importlib.import_module(module), symbol)
    with pytest.raises(AttributeError, match=re.escape(f"{module}.{symbol} is gone")):
        apply_cpu_shim()


@pytest.mark.parametrize("module", ASKS_FOR_CUDA)
def test_module_that_no_longer_uses_torch_raises(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.delattr(importlib.import_module(module), "torch")
    with pytest.raises(
        AttributeError, match=rf"{re.escape(module)} .*does not fit this megatron-core"
    ):
        apply_cpu_shim()


def test_nothing_is_replaced_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = importlib.import_module(ASKS_FOR_CUDA[0])
    monkeypatch.setattr(module, "torch", torch)
    assert not apply_cpu_shim()
    assert module.torch is torch
