"""What delayed FP8 scaling remembers: scales and amax histories of every quantised matrix.

Transformer Engine would put them into a checkpoint as a pickle; here they are tensors like others.
Every other recipe takes its scales from the tensor at hand and remembers nothing.

Transformer Engine takes the largest value over all data- and tensor-parallel ranks, so all ranks
that hold a layer remember the same of it, and a run in another layout takes it from any of them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from torch import nn

from ghostvis_mega.checkpoint.reader import FP8_PREFIX
from ghostvis_mega.model.llm import LLMChunk

log = logging.getLogger(__name__)

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_FIELDS = ("scale", "amax_history")
_TENSORS_PER_GEMM = 3
"""Input, weight and output: Transformer Engine keeps a scale for each in the forward pass."""


def capture_fp8_state(chunks: Iterable[LLMChunk]) -> list[tuple[str, torch.Tensor]]:
    """Named tensors of all modules that have run in FP8 with delayed scaling; else an empty
    list."""
    return [
        (f"{name}/{direction}/{field}", getattr(module.fp8_meta[direction], field))
        for name, module in _modules(chunks)
        for direction in _DIRECTIONS
        if hasattr(module.fp8_meta.get(direction), "amax_history")
        for field in _FIELDS
    ]


def restore_fp8_state(
    chunks: Iterable[LLMChunk], saved: Mapping[str, torch.Tensor], *, of_all_ranks: bool = False
) -> None:
    """Put scales and histories back, before the first forward pass; a warning if a model that
    needs some finds none.

    Args:
        chunks: The model of this rank.
        saved: From `capture_fp8_state`; other names are left alone.
        of_all_ranks: Whether `saved` is of the whole model, so that some layers are elsewhere.
    """
    mine = {name: tensor for name, tensor in saved.items() if name.startswith(FP8_PREFIX)}
    known = dict(_modules(chunks))
    by_module = {name.rsplit("/", 2)[0] for name in mine}
    unknown = sorted(by_module - known.keys())
    if unknown and not of_all_ranks:
        log.warning(
            "the checkpoint holds FP8 scales of %s, which does not run in FP8: left out", unknown[0]
        )
    if known and not mine:
        log.warning(
            "train.fp8=delayed, but the checkpoint holds no FP8 scales: they begin at 1 and follow "
            "the values of the next steps"
        )
    for name in sorted(by_module & known.keys()):
        module = known[name]
        gemms = mine[f"{name}/scaling_fwd/scale"].numel() // _TENSORS_PER_GEMM
        recipe = get_fp8_recipe(module.config)
        module.fp8_meta |= {"num_gemms": gemms, "recipe": recipe}
        module.init_fp8_meta_tensors(recipe)
        for direction in _DIRECTIONS:
            for field in _FIELDS:
                target = getattr(module.fp8_meta[direction], field)
                target.copy_(mine[f"{name}/{direction}/{field}"])


def _modules(chunks: Iterable[LLMChunk]) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's modules of an FP8 model with delayed scaling, by global name."""
    for chunk in chunks:
        if getattr(chunk.config, "fp8", None) is None or chunk.config.fp8_recipe != "delayed":
            continue
        for name, module in chunk.named_modules():
            if isinstance(module, nn.Module) and hasattr(module, "init_fp8_meta_tensors"):
                yield f"{FP8_PREFIX}{chunk.global_name(name)}", module
