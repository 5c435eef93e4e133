"""A small state of a run for drills: all kinds of files; contents follow from step and rank."""

import hashlib
from pathlib import Path

import torch

from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.checkpoint.reader import whole_damage
from ghostvis_mega.checkpoint.snapshot import HostBuffers, Snapshot
from ghostvis_mega.checkpoint.tensors import FileImage

PARAMETERS = {"embedding.weight": "llm", "tower.weight": "vision"}
_SHAPE = [64, 16]
_ELEMENTS = 1024


def drill_snapshot(step: int, *, rank: int, ranks: int) -> Snapshot:
    """What a rank would save after `step` steps: weights on the first, its share of the moments,
    its generators."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    share = _ELEMENTS // ranks
    slices = {name: [rank * share, share] for name in PARAMETERS}
    files: dict[str, tuple[str, dict[str, list[int]], list[str]]] = {
        "optimizer": (
            "optimizer",
            slices,
            [f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in PARAMETERS],
        ),
        "random": ("random", {}, ["torch/cpu"]),
    }
    if rank == 0:
        for name, module in PARAMETERS.items():
            files[module] = ("weights", {name: [0, _ELEMENTS]}, [name])
    buffers, contents, entries = HostBuffers(pinned=False), {}, {}
    for stem, (kind, held, keys) in files.items():
        length = _ELEMENTS if kind == "weights" else share
        tensors = [(key, torch.randn(length, generator=generator)) for key in keys]
        image = FileImage(tensors, metadata={})
        name = f"{stem}-{rank:05d}.safetensors"
        contents[name] = buffers.get(name, image.size_bytes)
        image.copy_to(contents[name])
        entries[name] = {
            "bytes": image.size_bytes,
            "kind": kind,
            "rank": rank,
            "tensor_rank": 0,
            "slices": held,
        }
    parameters = {
        name: {
            "shape": _SHAPE,
            "dtype": "float32",
            "module": module,
            "partition_dim": None,
            "partition_parts": 1,
        }
        for name, module in PARAMETERS.items()
    }
    return Snapshot(
        rank=rank,
        step=step,
        files=contents,
        entries=entries,
        about={"parameters": parameters, "optimizer_steps": {"llm": step, "vision": step}},
        shared={"sequences": 8 * step, "layout": {"world_size": ranks}, "versions": {}},
    )


def content_problem(path: Path) -> str | None:
    """A sentence unless the checkpoint holds exactly the state of its step."""
    if damage := whole_damage(path):
        return "; ".join(damage)
    manifest = read_manifest(path)
    ranks = manifest.layout["world_size"]
    assert isinstance(ranks, int)
    expected = {
        name: hashlib.sha256(content.numpy()).hexdigest()
        for rank in range(ranks)
        for name, content in drill_snapshot(manifest.step, rank=rank, ranks=ranks).files.items()
    }
    found = {name: info.sha256 for name, info in manifest.files.items()}
    return None if found == expected else f"{path} is not the state after step {manifest.step}"
