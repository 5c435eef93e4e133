"""A small checkpoint written by hand: two tensor-parallel ranks, moments cut by two replicas."""

import json
from pathlib import Path

import torch

from ghostvis_mega.checkpoint.manifest import write_manifest
from ghostvis_mega.checkpoint.tensors import write_tensors
from ghostvis_mega.model.shards import shard

NAME = "decoder.layers.0.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
WHOLE = torch.arange(48, dtype=torch.float32).view(8, 6)
NORM_VALUES = torch.arange(6, dtype=torch.float32).to(torch.bfloat16)
CUT_AT = 10
"""Where the second replica's share of the moments begins, in each tensor-parallel part."""


def part_of(rank: int) -> torch.Tensor:
    """What a tensor-parallel rank holds of `NAME`."""
    return shard(WHOLE, NAME, size=2, rank=rank, gated=True)


def write_tiny(path: Path, *, serial: int = 1, step: int = 3) -> Path:
    """Write it to the new directory `path`."""
    path.mkdir(parents=True)
    files = {}

    def add(name: str, kind: str, tensor_rank: int, slices: dict, tensors: list) -> None:
        size, sha256 = write_tensors(path / name, tensors, metadata={})
        files[name] = {
            "bytes": size,
            "sha256": sha256,
            "kind": kind,
            "rank": int(name.split("-")[1][:5]),
            "tensor_rank": tensor_rank,
            "slices": slices,
        }

    for rank in range(2):
        part = part_of(rank)
        slices, tensors = {NAME: [0, part.numel()]}, [(NAME, part.contiguous())]
        if rank == 0:
            slices[NORM] = [0, 6]
            tensors.append((NORM, NORM_VALUES))
        add(f"llm-{rank:05d}.safetensors", "weights", rank, slices, tensors)
        for replica, (start, end) in enumerate(((0, CUT_AT), (CUT_AT, part.numel()))):
            add(
                f"optimizer-{rank + 2 * replica:05d}.safetensors",
                "optimizer",
                rank,
                {NAME: [start, end - start]},
                [(f"exp_avg/{NAME}", -part.flatten()[start:end].contiguous())],
            )
    add("random-00000.safetensors", "random", 0, {}, [("torch/cpu", torch.get_rng_state())])
    described = {"dtype": "float32", "module": "llm"}
    write_manifest(
        path,
        {
            "serial": serial,
            "step": step,
            "sequences": 8 * step,
            "layout": {"parallel.tensor": 2},
            "optimizer_steps": {"llm": step},
            "parameters": {
                NAME: {"shape": [8, 6], "partition_dim": 0, "partition_parts": 2, **described},
                NORM: {"shape": [6], "partition_dim": None, "partition_parts": 1, **described}
                | {"dtype": "bfloat16"},
            },
            "files": files,
            "extra": {},
        },
    )
    return path


def with_moments(path: Path, *, num_layers: int = 2) -> Path:
    """The checkpoint at `path` with all optimizer tensors, so that it can be cut."""
    document = json.loads((path / "manifest.json").read_text())
    document["layout"] |= {"model.llm.num_layers": num_layers, "model.llm.num_kv_heads": 2}
    for name, info in document["files"].items():
        if info["kind"] == "optimizer":
            (path / name).unlink()
            start, length = info["slices"][NAME]
            part = part_of(info["tensor_rank"]).flatten()[start : start + length]
            tensors = [(f"exp_avg/{NAME}", -part), (f"exp_avg_sq/{NAME}", torch.square(part))]
            size, digest = write_tensors(path / name, tensors, metadata={})
            info |= {"bytes": size, "sha256": digest}
    write_manifest(path, document)
    return path
