"""A checkpoint's tensors whole, put together from the manifest by the stock library alone."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from ghostvis_mega.model.shards import unshard

Whole = dict[str, torch.Tensor]


def consolidate(path: Path) -> Whole:
    """Weights and optimizer tensors by name; whatever no file holds is NaN."""
    document = json.loads((path / "manifest.json").read_text())
    parameters = document["parameters"]
    parts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    sizes = {i["tensor_rank"] for i in document["files"].values() if i["kind"] == "weights"}
    for file, info in document["files"].items():
        if info["kind"] == "random":
            continue
        for key, tensor in load_file(path / file).items():
            name = key if info["kind"] == "weights" else key.split("/", 1)[1]
            about = parameters[name]
            count = len(sizes) if about["partition_dim"] is not None else 1
            rank = info["tensor_rank"] if count > 1 else 0
            numel = torch.Size(about["shape"]).numel() // count
            whole = parts[key].setdefault(rank, torch.full((numel,), torch.nan, dtype=tensor.dtype))
            start, length = info["slices"][name]
            whole[start : start + length] = tensor.view(-1)
    out: Whole = {}
    for key, found in parts.items():
        name = key.rsplit("/", 1)[-1]
        shape = list(parameters[name]["shape"])
        if len(found) > 1:
            shape[parameters[name]["partition_dim"]] //= len(found)
        pieces = [found[rank].view(shape) for rank in sorted(found)]
        gated = parameters[name]["partition_parts"] == 2
        out[key] = unshard(pieces, name, gated=gated)
    return out


def differing(one: Whole, other: Whole) -> list[str]:
    """Names of tensors that only one has, or that differ in any bit."""
    names = sorted(one.keys() ^ other.keys())
    for name in sorted(one.keys() & other.keys()):
        a, b = one[name], other[name]
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
            names.append(name)
    return names
