"""The state of one rank in host memory, so that training goes on while it is written."""

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json

log = logging.getLogger(__name__)

_DIGEST_BYTES = 100
"""A digest in the manifest, with its key."""
_ROUND_BYTES = 1 << 20
"""So that a file which grows by a few bytes still fits."""


@dataclass(frozen=True)
class Snapshot:
    """The state of one rank between two steps, in host memory."""

    rank: int
    step: int
    """Optimizer steps done."""
    files: dict[str, torch.Tensor]
    """Content of each file, uint8; overwritten by the next snapshot into the same buffers."""
    entries: dict[str, dict[str, Any]]
    """What the manifest says of each file, but for its digest."""
    about: dict[str, Any]
    """Sections of the manifest to which every rank adds."""
    shared: dict[str, Any]
    """Sections of the manifest that are the same on all ranks."""

    @property
    def num_bytes(self) -> int:
        """What this rank will write, with its share of the manifest."""
        said = [self.entries, self.about] + ([self.shared] if self.rank == 0 else [])
        words = len(canonical_json(said)) + _DIGEST_BYTES * (len(self.entries) + 1)
        return sum(content.numel() for content in self.files.values()) + words


class HostBuffers:
    """Host memory for snapshots, kept from one to the next; pinned where there is CUDA.

    Pinned memory is registered by hand: PyTorch's own allocator would round it up to a power of
    two. The driver must forget it before the memory is used for anything else, so that happens
    with the tensor's end, however that comes.
    """

    def __init__(self, *, pinned: bool):
        self.pinned = pinned
        self._kept: dict[str, torch.Tensor] = {}

    def get(self, name: str, num_bytes: int) -> torch.Tensor:
        """A buffer of this size; its content is that of the last one of this name, or anything."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < num_bytes:
            self._kept.pop(name, None)
            del kept
            rounded = -(-num_bytes // _ROUND_BYTES) * _ROUND_BYTES
            try:
                kept = torch.empty(rounded, dtype=torch.uint8)
            except RuntimeError as error:
                raise CheckpointError(
                    f"the host has no {rounded / 1e9:.3f} GB for the snapshot of {name}: {error}"
                ) from error
            if self.pinned:
                _pin(kept)
                weakref.finalize(kept, _unpin, kept.data_ptr()).atexit = False
            else:
                kept.zero_()  # the system hands out memory when it is first touched
            self._kept[name] = kept
        return kept[:num_bytes]

    def close(self) -> None:
        """Give all memory back."""
        self._kept.clear()


def _pin(memory: torch.Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        raise CheckpointError(
            f"host memory for the snapshot cannot be pinned (CUDA error {int(code)}): "
            "`ulimit -l` must allow it, and the host must have room for this rank's state"
        )


def _unpin(address: int) -> None:
    code = torch.cuda.cudart().cudaHostUnregister(address)
    if int(code) != 0:
        log.warning("pinned host memory could not be released (CUDA error %d)", int(code))
