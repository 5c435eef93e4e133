"""Memory that runs out is told in a sentence."""

import contextlib
from collections.abc import Iterator

import torch

from ghostvis_mega.utils.errors import GhostVisError


class OutOfMemory(GhostVisError, RuntimeError):
    """The model, or so many answers side by side, do not fit."""


@contextlib.contextmanager
def memory_told() -> Iterator[None]:
    """What runs out of memory inside says so; also a decorator.

    Raises:
        OutOfMemory: Instead of what torch raises on this device.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for the memory of the host.
        told = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not told and "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemory(
            "the memory does not suffice: use fewer --rows, fewer --max-tokens or shorter prompts, "
            "--precision bf16, or share the model over more --tensor ranks "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
