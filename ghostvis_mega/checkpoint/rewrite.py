"""A checkpoint cut anew for another layout, without processes or a model: `ghostvis ckpt reshard`.

A run resumes from a checkpoint of any layout by itself; one that was cut for it lets each rank read
just its own files. Tensors pass by one at a time.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from ghostvis_mega.checkpoint.manifest import MOMENTS, Kind, ParameterInfo, write_manifest
from ghostvis_mega.checkpoint.reader import FP8_PREFIX, CheckpointReader
from ghostvis_mega.checkpoint.resharding import Part, missing_part, read_part
from ghostvis_mega.checkpoint.tensors import Later, write_later, write_tensors
from ghostvis_mega.config.rules_pipeline import stage_layers
from ghostvis_mega.config.schema import ParallelConfig
from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import fsync_directory, temporary_name

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """The layout to cut for; ranks are laid out as Megatron-Core does, tensor fastest."""

    parallel: ParallelConfig
    world_size: int

    @property
    def replicas(self) -> int:
        """Ranks that hold the same LLM weights."""
        return self.world_size // (self.parallel.tensor * self.parallel.pipeline)


def reshard(source: Path, output: Path, target: Target) -> Path:
    """Write `source` anew as a run of `target` would have saved it, without random generators: the
    ranks that these belong to are not those of the target.

    Raises:
        CheckpointError: The source is damaged, the model cannot be cut so, `output` exists, or it
            cannot be written.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already: name a new directory")
    with CheckpointReader(source) as reader:
        if damage := reader.damage(reader.files()):
            raise CheckpointError("; ".join(damage))
        sizes = _stages(reader, target)
        try:
            _write(reader, output, target, sizes)
        except OSError as error:
            raise CheckpointError(
                f"{output} cannot be written: {error.strerror or error}"
            ) from error
    return output


def _write(reader: CheckpointReader, output: Path, target: Target, sizes: tuple[int, ...]) -> None:
    """All files under a fresh name, which one that was killed cannot have taken, then the right
    one."""
    temporary = temporary_name(output)
    temporary.mkdir(parents=True)
    done = False
    try:
        files: dict[str, Any] = {}
        fp8_state = reader.fp8_state()
        for rank in range(target.world_size):
            files |= _write_rank(reader, temporary, target, sizes, rank)
            files |= _write_fp8_state(fp8_state, temporary, target, sizes, rank)
        _write_manifest(reader, temporary, target, files)
        os.replace(temporary, output)
        done = True
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
    fsync_directory(output.parent)


def _stages(reader: CheckpointReader, target: Target) -> tuple[int, ...]:
    """Layers of each stage, after a look at everything that must divide."""
    p, layout = target.parallel, reader.manifest.layout
    if target.world_size % (p.tensor * p.pipeline * p.context):
        raise CheckpointError(
            f"{target.world_size} processes cannot hold replicas of tensor {p.tensor} x pipeline "
            f"{p.pipeline} x context {p.context}"
        )
    layers, heads = layout.get("model.llm.num_layers"), layout.get("model.llm.num_kv_heads")
    sizes = stage_layers(p, layers) if isinstance(layers, int) else None
    if sizes is None:
        raise CheckpointError(f"{layers} layers cannot be dealt out over {p.pipeline} stages so")
    if isinstance(heads, int) and heads % p.tensor:
        raise CheckpointError(f"tensor={p.tensor} does not divide model.llm.num_kv_heads={heads}")
    for name, info in reader.manifest.parameters.items():
        dim = info.partition_dim
        if dim is not None and info.shape[dim] % (p.tensor * info.partition_parts):
            raise CheckpointError(f"tensor={p.tensor} does not divide {name}, {info.shape}")
    return sizes


def _stage_of(name: str, sizes: tuple[int, ...], virtual: int) -> int:
    """The pipeline stage that saves a parameter of the LLM."""
    if name.startswith("embedding."):
        return 0
    if not name.startswith("decoder.layers."):
        return len(sizes) - 1
    at = int(name.split(".")[2]) % (sum(sizes) // virtual)
    for stage, size in enumerate(sizes):
        at -= size // virtual
        if at < 0:
            return stage
    raise AssertionError(f"{name} is on no stage")


def _write_rank(
    reader: CheckpointReader, folder: Path, target: Target, sizes: tuple[int, ...], rank: int
) -> dict[str, Any]:
    """The files of one rank; their entries for the manifest."""
    tensor = rank % target.parallel.tensor
    chosen: dict[str, tuple[Kind, dict[str, list[int]], list[tuple[str, Later]]]] = {}
    for name, info in reader.manifest.parameters.items():
        for kind, part in _parts_of(name, info, target, sizes, rank):
            if kind == "optimizer" and missing_part(reader, kind, name, part):
                continue  # frozen
            stem = kind if kind == "optimizer" else "llm" if info.module == "llm" else "vision"
            _, slices, tensors = chosen.setdefault(stem, (kind, {}, []))
            slices[name] = [part.start, part.length]
            tensors += _tensors(reader, kind, name, info, part)
    entries = {}
    for stem, (kind, slices, tensors) in chosen.items():
        file = f"{stem}-{rank:05d}.safetensors"
        size, digest = write_later(folder / file, tensors, metadata={})
        entries[file] = {
            "bytes": size,
            "sha256": digest,
            "kind": kind,
            "rank": rank,
            "tensor_rank": tensor,
            "slices": slices,
        }
    return entries


def _write_fp8_state(
    saved: dict[str, torch.Tensor],
    folder: Path,
    target: Target,
    sizes: tuple[int, ...],
    rank: int,
) -> dict[str, Any]:
    """Scales and histories of the layers of one rank; their entry for the manifest, if any."""
    tensor = rank % target.parallel.tensor
    stage = rank // target.parallel.tensor // target.replicas
    virtual = target.parallel.virtual_pipeline
    tensors = [
        (key, value)
        for key, value in saved.items()
        if _stage_of(key.removeprefix(FP8_PREFIX), sizes, virtual) == stage
    ]
    if not tensors:
        return {}
    file = CheckpointReader.random_file(rank)
    size, digest = write_tensors(folder / file, tensors, metadata={})
    about = {"kind": "random", "rank": rank, "tensor_rank": tensor, "slices": {}}
    return {file: {"bytes": size, "sha256": digest, **about}}


def _parts_of(
    name: str, info: ParameterInfo, target: Target, sizes: tuple[int, ...], rank: int
) -> Iterator[tuple[Kind, Part]]:
    """What a rank saves of a parameter: weights once, optimizer states shared by all replicas."""
    degree = target.parallel.tensor
    cut = info.partition_dim is not None
    tensor, replica = rank % degree, rank // degree % target.replicas
    if info.module == "llm":
        stage = _stage_of(name, sizes, target.parallel.virtual_pipeline)
        if rank // degree // target.replicas != stage or (not cut and tensor):
            return
        number, sharers = replica, target.replicas
    else:
        number, sharers = rank, target.world_size
    parts = degree if cut else 1
    numel = prod(info.shape) // parts
    if number == 0:
        yield "weights", Part(rank=tensor if cut else 0, parts=parts, start=0, length=numel)
    each = -(-numel // sharers)
    length = min(each, numel - number * each)
    if length > 0:
        start = number * each
        yield "optimizer", Part(rank=tensor if cut else 0, parts=parts, start=start, length=length)


def _tensors(
    reader: CheckpointReader, kind: Kind, name: str, info: ParameterInfo, part: Part
) -> Iterator[tuple[str, Later]]:
    if kind == "weights":
        shape = list(info.shape)
        if info.partition_dim is not None:
            shape[info.partition_dim] //= part.parts
        load = partial(read_part, reader, kind, name, part)
        yield name, Later(_DTYPES[info.dtype], tuple(shape), load)
        return
    kinds = MOMENTS if info.dtype == "float32" else ("master", *MOMENTS)
    for prefix in kinds:
        load = partial(read_part, reader, kind, name, part, prefix=f"{prefix}/")
        yield f"{prefix}/{name}", Later(torch.float32, (part.length,), load)


def _write_manifest(
    reader: CheckpointReader, folder: Path, target: Target, files: dict[str, Any]
) -> None:
    old, p = reader.manifest, target.parallel
    layout = dict(old.layout)
    layout |= {
        "parallel.tensor": p.tensor,
        "parallel.pipeline": p.pipeline,
        "parallel.virtual_pipeline": p.virtual_pipeline,
        "parallel.context": p.context,
        "world_size": target.world_size,
    }
    for end in ("first_stage_layers", "last_stage_layers"):
        layout.pop(f"parallel.{end}", None)
        if (layers := getattr(p, end)) is not None:
            layout[f"parallel.{end}"] = layers
    document = old.model_dump(mode="json", by_alias=True)
    fsync_directory(folder)
    write_manifest(
        folder, document | {"layout": layout, "files": files, "versions": package_versions()}
    )
