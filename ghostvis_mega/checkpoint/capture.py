"""What one rank saves: its files with their tensors, and what it knows of the parameters."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ghostvis_mega.checkpoint.fp8_state import capture_fp8_state
from ghostvis_mega.checkpoint.held import (
    Held,
    held_parameters,
    optimizer_span,
    optimizer_steps,
    saves_optimizer_state,
    saves_weight,
    weight_span,
)
from ghostvis_mega.checkpoint.layout import engine_name, layout_of
from ghostvis_mega.checkpoint.manifest import MOMENTS, Kind
from ghostvis_mega.checkpoint.random_state import capture_random_state
from ghostvis_mega.checkpoint.snapshot import HostBuffers, Snapshot
from ghostvis_mega.checkpoint.tensors import FileImage
from ghostvis_mega.engine.optimizer import host_threads, module_of
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.init import unsharded_shape
from ghostvis_mega.model.shards import partition_dim
from ghostvis_mega.utils.environment import package_versions


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
