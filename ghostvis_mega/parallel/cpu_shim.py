"""What Megatron-Core 0.19 needs to run without CUDA, in one place.

Megatron-Core asks `torch.cuda` for the current device, for synchronisation and for random states,
also where nothing else needs a GPU. On a machine without CUDA its modules are given a `torch` that
answers those calls for the CPU; torch itself, and every other library, stay as they are. With CUDA
nothing is replaced.
"""

import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

REPLACED = {
    "megatron.core.tensor_parallel.random": ("_get_cuda_rng_state", "_set_cuda_rng_state"),
}
"""Functions replaced by a CPU version, by module."""

ASKS_FOR_CUDA = (
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.mlp",
)
"""Modules that must have a global called `torch`; every other loaded Megatron-Core module gets the
same."""


class _CudaOnCpu:
    """The part of `torch.cuda` that Megatron-Core calls, answered for the CPU; the rest is torch's
    own."""

    manual_seed = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda *_, **__: torch.get_rng_state())

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*_: Any) -> None:
        """CPU work is done when the call returns."""

    @staticmethod
    def current_stream(*_: Any) -> torch.cpu.Stream:
        """CPU work runs on no stream but this one."""
        return torch.cpu.current_stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(factory: Callable) -> Callable:
    """Make a tensor factory read device="cuda" as the CPU (Megatron-Core's schedules say it
    literally)."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(kwargs.get("device"), str) and kwargs["device"].startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _TorchOnCpu(types.ModuleType):
    """`torch` as Megatron-Core's modules see it on a machine without CUDA."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in ("zeros", "empty", "ones", "tensor"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def apply_cpu_shim() -> bool:
    """Prepare Megatron-Core for a machine without CUDA; call it before models and groups are built.

    Returns:
        Whether anything was replaced: False where CUDA is there.

    Raises:
        AttributeError: A symbol to replace is gone, so this Megatron-Core is not the one that was
            tested.
    """
    if torch.cuda.is_available():
        return False
    proxy = _TorchOnCpu()
    for name in ASKS_FOR_CUDA:
        if not hasattr(importlib.import_module(name), "torch"):
            raise AttributeError(
                f"{name} has no global `torch`; the CPU shim does not fit this megatron-core"
            )
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = proxy
    cpu_versions = {"_get_cuda_rng_state": _get_rng_state, "_set_cuda_rng_state": _set_rng_state}
    for name, symbols in REPLACED.items():
        module = importlib.import_module(name)
        for symbol in symbols:
            if not hasattr(module, symbol):
                raise AttributeError(
                    f"{name}.{symbol} is gone; the CPU shim does not fit this megatron-core"
                )
            setattr(module, symbol, cpu_versions[symbol])
    log.debug("no CUDA: Megatron-Core runs on the CPU")
    return True
