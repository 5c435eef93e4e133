"""Initial weights that depend on (seed, parameter name) alone.

Every layout of the same model starts from the same numbers: each parameter is drawn whole from a
generator seeded with its global name, then cut. Random streams differ between CPU and GPU, so a run
starts alike on one kind only.
"""

import hashlib

import torch
from torch import nn

from ghostvis_mega.model.shards import VOCABULARIES, canonical_name, partition_dim, shard


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter of a run."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _draw(
    shape: torch.Size, *, name: str, seed: int, std: float, device: torch.device
) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(name_seed(seed, name))
    return torch.empty(shape, device=device, dtype=torch.float32).normal_(
        0.0, std, generator=generator
    )


def is_norm(name: str) -> bool:
    """Whether a parameter belongs to a LayerNorm or RMSNorm."""
    return "norm" in name.rsplit(".", 2)[-2] or name.endswith("layer_norm_weight")


@torch.no_grad()
def initialize(
    parameters: list[tuple[str, nn.Parameter]],
    *,
    seed: int,
    std: float,
    tensor_size: int = 1,
    tensor_rank: int = 0,
    gated: bool = True,
    vocab_tokens: int | None = None,
) -> None:
    """Fill parameters in place: norms with ones, biases with zeros, the rest with N(0, std).

    Args:
        parameters: (global name, local parameter or shard of it).
        std: Standard deviation of matrices and embeddings.
        tensor_size: Tensor-parallel degree that the shards come from.
        vocab_tokens: Rows of embedding and head behind these are padding, and zero.
    """
    for raw_name, parameter in parameters:
        name = canonical_name(raw_name)
        if name.endswith("bias"):
            parameter.zero_()
        elif is_norm(name):
            parameter.fill_(1.0)
        else:
            shape = torch.Size(
                unsharded_shape(parameter, name, tensor_size)
                if tensor_size > 1
                else parameter.shape
            )
            full = _draw(shape, name=name, seed=seed, std=std, device=parameter.device)
            if name in VOCABULARIES and vocab_tokens is not None:
                full[vocab_tokens:] = 0.0
            parameter.copy_(shard(full, name, size=tensor_size, rank=tensor_rank, gated=gated))


def unsharded_shape(parameter: torch.Tensor, name: str, tensor_size: int) -> list[int]:
    """Shape of the whole parameter that a tensor-parallel shard was cut from."""
    shape = list(parameter.shape)
    dim = partition_dim(name)
    if dim is not None:
        shape[dim] *= tensor_size
    return shape
