"""How evenly a plan loads data-parallel ranks, simulated step by step as BatchSource deals packs.

A step is as slow as its most loaded rank, so the figure is the largest load over the mean.
"""

from typing import Any

import numpy as np

from ghostvis_mega.data.looks.packing import Packed
from ghostvis_mega.data.order import permute

PACKS_PER_RANK = 8
MAX_STEPS = 12

# What one sample costs in a forward pass, in multiply-adds, for a 1.5B language model (28 layers,
# 1,536 wide, 1.31B weights beside the embeddings) and a 400M tower (27 layers, 1,152 wide). Only
# the ratio of the two matters here.
_LLM_WEIGHTS, _LLM_LAYERS, _LLM_WIDTH = 1.31e9, 28, 1536
_TOWER_WEIGHTS, _TOWER_LAYERS, _TOWER_WIDTH = 4.1e8, 27, 1152


def pack_costs(packed: Packed, *, patches_per_image: int) -> np.ndarray:
    """float64 [sequences, 2]: cost of the tower, and of tower and language model together."""
    tower = packed.distinct * tower_cost(patches_per_image)
    return np.stack([tower, tower + llm_cost(packed.slots, packed.sumsq)], axis=1)


def tower_cost(patches: np.ndarray | int) -> np.ndarray | float:
    """Multiply-adds of the tower for pictures of so many patches."""
    return patches * (_TOWER_WEIGHTS + 2 * _TOWER_LAYERS * _TOWER_WIDTH * patches)


def llm_cost(slots: np.ndarray, sumsq: np.ndarray) -> np.ndarray:
    """Multiply-adds of the language model for sequences.

    Args:
        slots: positions: rows have a fixed length, so padding is computed too.
        sumsq: sum of squared sample lengths: attention is causal, inside samples.
    """
    return slots * _LLM_WEIGHTS + _LLM_LAYERS * _LLM_WIDTH * sumsq


def simulate(
    packed: Packed, *, data_parallel: int, patches_per_image: int, seed: int
) -> dict[str, Any]:
    """Load of the worst rank over the mean rank, averaged over the first steps of a run.

    Args:
        packed: sequences in the order of the plan.

    Returns:
        `naive` (each rank takes its run of the shuffled packs) and `assigned` (two-cost
        assignment), each with `tower` and `total`; 1 is perfect.
    """
    from ghostvis_mega.data.source import balance  # imports torch, which most commands do without

    count, size = len(packed.tokens), PACKS_PER_RANK * data_parallel
    costs = pack_costs(packed, patches_per_image=patches_per_image)
    weights = np.stack([packed.tokens, packed.distinct], axis=1).astype(np.float64)
    steps = max(1, min(MAX_STEPS, count // size))
    naive, assigned = [], []
    for step in range(steps):
        order = packs_of_step(step, size=size, count=count, seed=seed)
        naive.append(_worst_over_mean(costs[order].reshape(data_parallel, PACKS_PER_RANK, 2)))
        members = np.array(balance(weights[order], bins=data_parallel))
        assigned.append(_worst_over_mean(costs[order[members]]))
    return {
        "data_parallel": data_parallel,
        "global_size": size,
        "steps": steps,
        "epochs_a_step": round(size / count, 3),
        "naive": _mean(naive),
        "assigned": _mean(assigned),
    }


def packs_of_step(step: int, *, size: int, count: int, seed: int) -> np.ndarray:
    """Packs of a step as BatchSource numbers them: without end, each epoch permuted."""
    numbers = np.arange(step * size, (step + 1) * size)
    epochs, places = numbers // count, numbers % count
    return np.concatenate(
        [
            permute(places[epochs == epoch], count=count, seed=seed, epoch=int(epoch))
            for epoch in np.unique(epochs)
        ]
    )


def _worst_over_mean(costs_RPC: np.ndarray) -> np.ndarray:
    """float64 [2] from costs [ranks, packs, 2]; 1.0 where nothing costs anything."""
    loads = costs_RPC.sum(axis=1)
    mean = loads.mean(axis=0)
    return np.where(mean > 0, loads.max(axis=0) / np.maximum(mean, 1e-30), 1.0)


def _mean(ratios: list[np.ndarray]) -> dict[str, float]:
    tower, total = np.mean(ratios, axis=0)
    return {"tower": round(float(tower), 4), "total": round(float(total), 4)}
