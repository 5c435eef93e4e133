"""Parameter groups, AdamW and the learning-rate schedule."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ghostvis_mega.config.schema import MODULES, OptimConfig

_NO_DECAY = ("position_embedding", "class_embedding", "latents")


def module_of(name: str) -> str:
    """The module group (llm, vision, resampler, projector) that a global parameter name belongs
    to."""
    for prefix, module in (
        ("tower.", "vision"),
        ("resampler.", "resampler"),
        ("projector.", "projector"),
    ):
        if name.startswith(prefix):
            return module
    return "llm"


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig
) -> list[dict[str, Any]]:
    """AdamW groups: one a module and a decay setting, only of parameters that train.

    Args:
        named: (global name, parameter).
        optim: Learning rates and weight decay; matrices decay, except embeddings of positions and
            latents.
    """
    chosen: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(part in name for part in _NO_DECAY)
            chosen.setdefault((module_of(name), decays), []).append(parameter)
    order = sorted(chosen, key=lambda key: (MODULES.index(key[0]), not key[1]))
    return [
        {
            "params": chosen[module, decays],
            "lr": getattr(optim.lr, module),
            "weight_decay": optim.weight_decay if decays else 0.0,
            "module": module,
        }
        for module, decays in order
    ]


def build_adamw(
    groups: list[dict[str, Any]],
    optim: OptimConfig,
    *,
    device: torch.device,
    offload: bool = False,
) -> torch.optim.AdamW:
    """AdamW with PyTorch's fused kernel on CUDA and for an offloaded update, its ordinary one
    elsewhere.

    On a host the fused kernel reads and writes each number once: a fifth of the ordinary one's
    time, and as fast as memory gives, so that DeepSpeed's own has nothing to add but its compiler.
    """
    fused = offload or device.type == "cuda"
    return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=fused)


@contextlib.contextmanager
def host_threads(device: torch.device) -> Iterator[int]:
    """An update on the host beside a GPU takes this process's share of the cores; launchers give a
    process one thread.

    Args:
        device: Of the parameters; on a CPU nothing changes.

    Yields:
        Number of threads.
    """
    before = torch.get_num_threads()
    share = before
    if device.type == "cuda":
        # One process drives one GPU of this machine.
        share = max(before, len(os.sched_getaffinity(0)) // torch.cuda.device_count())
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(before)


def lr_factor(step: int, *, optim: OptimConfig, total_steps: int) -> float:
    """Share of the peak learning rate at `step`, counted from 0: linear warm-up, then the schedule.

    The last step reaches `min_lr_ratio`.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    span = max(1, total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    left = (
        1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * left
