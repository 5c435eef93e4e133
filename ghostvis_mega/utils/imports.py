"""Importing thousands of modules at once."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def many_imports() -> Iterator[None]:
    """Inside, nothing looks for cyclic garbage, and without a GPU nothing is marked for a compiler.

    Modules live as long as the process, so a collector that comes by after every few hundred new
    objects finds nothing, in a sixth of the time that the imports take. What is there at the end is
    never looked at again, which also makes the collections of training shorter.

    Megatron-Core marks small functions with `torch.compile` when it is imported, and the first mark
    loads all of PyTorch's compiler: about a second, for kernels that are worth it on GPUs.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _no_compiler_without_gpu():
            yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def _no_compiler_without_gpu() -> Iterator[None]:
    import torch

    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _as_it_is
    try:
        yield
    finally:
        torch.compile = compiler


def _as_it_is(model: Callable | None = None, **_: Any) -> Callable:
    """In place of `torch.compile`, as a call and as a decorator with options."""
    return model if model is not None else _as_it_is
