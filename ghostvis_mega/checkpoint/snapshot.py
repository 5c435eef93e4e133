"""What one rank saves: its files with their tensors, and what it knows of the parameters.

A `Snapshot` is all of it in host memory, so that training goes on while it is written.
"""

import logging
import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from ghostvis_mega.checkpoint.fp8_state import capture_fp8_state
from ghostvis_mega.checkpoint.held import (
    MOMENTS,
    Held,
    held_parameters,
    optimizer_span,
    optimizer_steps,
    saves_optimizer_state,
    saves_weight,
    weight_span,
)
from ghostvis_mega.checkpoint.layout import engine_name, layout_of
from ghostvis_mega.checkpoint.manifest import Kind
from ghostvis_mega.checkpoint.random_state import capture_random_state
from ghostvis_mega.checkpoint.tensors import FileImage
from ghostvis_mega.engine.optimizer import host_threads, module_of
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.init import unsharded_shape
from ghostvis_mega.model.shards import partition_dim
from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json

log = logging.getLogger(__name__)

_DIGEST_BYTES = 100
"""A digest in the manifest, with its key."""
_ROUND_BYTES = 1 << 20
"""So that a file which grows by a few bytes still fits."""


@dataclass
class RankFile:
    """One file of one rank; its tensors are views of the live state until it is written."""

    name: str
    kind: Kind
    slices: dict[str, list[int]] = field(default_factory=dict)
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def rank_files(engine: TrainEngine) -> list[RankFile]:
    """The files of this rank, without those that would be empty."""
    rank = engine.groups.rank
    llm, vision, optimizer = (
        RankFile(f"{stem}-{rank:05d}.safetensors", kind)
        for stem, kind in (("llm", "weights"), ("vision", "weights"), ("optimizer", "optimizer"))
    )
    for held in held_parameters(engine):
        _add_weight(llm if held.in_llm else vision, held)
        _add_optimizer_state(optimizer, held)
    tensors, texts = capture_random_state()
    tensors += capture_fp8_state(engine.parts.chunks)
    random = RankFile(f"random-{rank:05d}.safetensors", "random", tensors=tensors, metadata=texts)
    return [file for file in (llm, vision, optimizer, random) if file.tensors]


def _add_weight(file: RankFile, held: Held) -> None:
    span = weight_span(held)
    if span is None or not saves_weight(held):
        return
    weight = span.tensors["weight"]
    if weight.numel() == math.prod(held.shape):
        weight = weight.view(held.shape)
    file.slices[held.name] = [span.start, span.length]
    file.tensors.append((held.name, weight))


def _add_optimizer_state(file: RankFile, held: Held) -> None:
    span = optimizer_span(held)
    if span is None or not saves_optimizer_state(held):
        return
    file.slices[held.name] = [span.start, span.length]
    file.tensors += [(f"{kind}/{held.name}", span.tensors[kind]) for kind in saved_kinds(held)]


def saved_kinds(held: Held) -> tuple[str, ...]:
    """Optimizer tensors that are saved: an fp32 weight is its own master."""
    return MOMENTS if held.parameter.dtype == torch.float32 else ("master", *MOMENTS)


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
            kept = torch.empty(-(-num_bytes // _ROUND_BYTES) * _ROUND_BYTES, dtype=torch.uint8)
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


def make_buffers(engine: TrainEngine) -> HostBuffers:
    """Host memory for this rank's snapshots, so that the first one takes no longer than others."""
    buffers = HostBuffers(pinned=engine.device.type == "cuda")
    for file in rank_files(engine):
        buffers.get(file.name, FileImage(file.tensors, metadata=file.metadata).size_bytes)
    return buffers


def take_snapshot(engine: TrainEngine, buffers: HostBuffers, *, step: int) -> Snapshot:
    """Copy everything that this rank saves; training may go on when it returns.

    Args:
        engine: Between two steps.
        buffers: Overwritten.
        step: Optimizer steps done.
    """
    place = engine.groups.place
    files, entries = {}, {}
    with host_threads(engine.device):
        for file in rank_files(engine):
            image = FileImage(file.tensors, metadata=file.metadata)
            files[file.name] = buffers.get(file.name, image.size_bytes)
            image.copy_to(files[file.name])
            entries[file.name] = {
                "bytes": image.size_bytes,
                "kind": file.kind,
                "rank": engine.groups.rank,
                "tensor_rank": place.tensor,
                "slices": file.slices,
            }
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
    return Snapshot(
        rank=engine.groups.rank,
        step=step,
        files=files,
        entries=entries,
        about={
            "parameters": parameter_entries(engine),
            "optimizer_steps": {
                engine_name(engine, zero): optimizer_steps(zero) for zero in engine.engines
            },
        },
        shared={
            "sequences": step * engine.run.batch.global_size,
            "layout": layout_of(engine),
            "versions": package_versions(),
        },
    )


def parameter_entries(engine: TrainEngine) -> dict[str, dict[str, Any]]:
    """The manifest's description of each parameter that this rank holds."""
    gated = engine.run.model.llm.activation == "swiglu"
    entries = {}
    for held in held_parameters(engine):
        size = engine.groups.degrees.tensor if held.cut else 1
        local = torch.empty(held.shape, device="meta")
        stacked = gated and held.in_llm and held.name.endswith("linear_fc1.weight")
        entries[held.name] = {
            "shape": unsharded_shape(local, held.name, size) if held.cut else held.shape,
            "dtype": str(held.parameter.dtype).removeprefix("torch."),
            "module": module_of(held.name),
            "partition_dim": partition_dim(held.name) if held.cut else None,
            "partition_parts": 2 if stacked else 1,
        }
    return entries
