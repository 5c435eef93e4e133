"""What one rank writes: its files with their tensors, and what it knows of the parameters."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ghostvis_mega.checkpoint.fp8_state import capture_fp8_state
from ghostvis_mega.checkpoint.held import (
    MOMENTS,
    Held,
    held_parameters,
    optimizer_span,
    saves_optimizer_state,
    saves_weight,
    weight_span,
)
from ghostvis_mega.checkpoint.manifest import Kind
from ghostvis_mega.checkpoint.random_state import capture_random_state
from ghostvis_mega.checkpoint.tensors import write_tensors
from ghostvis_mega.engine.optimizer import module_of
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.init import unsharded_shape
from ghostvis_mega.model.shards import partition_dim


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


def write_rank_files(
    folder: Path, files: Iterable[RankFile], *, rank: int, tensor_rank: int
) -> dict[str, dict[str, Any]]:
    """Write all files of a rank; returns their entries for the manifest."""
    entries = {}
    for file in files:
        size, sha256 = write_tensors(folder / file.name, file.tensors, metadata=file.metadata)
        entries[file.name] = {
            "bytes": size,
            "sha256": sha256,
            "kind": file.kind,
            "rank": rank,
            "tensor_rank": tensor_rank,
            "slices": file.slices,
        }
    return entries


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
