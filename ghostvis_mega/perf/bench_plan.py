"""Timing of the planner alone: lengths only, and without torch, whose memory would count too."""

import resource
import time

import numpy as np

from ghostvis_mega.data.plan import PlanParams, pack_lengths
from ghostvis_mega.perf.synthetic_data import mixed_text_lengths

SEQ_LENGTH, TOKENS_PER_IMAGE = 4096, 64
SAMPLES_AN_IMAGE = 5
PARAMS = PlanParams(
    algorithm="balanced", seq_length=SEQ_LENGTH, tokens_per_image=TOKENS_PER_IMAGE, seed=0
)


def mixed_lengths(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Expanded lengths of the GhostVis mix, and groups of samples that share a picture."""
    text, pictured = mixed_text_lengths(count, seed=0)
    lengths = np.minimum(text + TOKENS_PER_IMAGE * pictured, SEQ_LENGTH)
    numbers = np.arange(count)
    return lengths, np.where(pictured, numbers // SAMPLES_AN_IMAGE, count + numbers)


def plan_once(count: int) -> dict[str, float]:
    """Plan `count` samples with grouping: wall and CPU seconds, fill, and the process's peak GB."""
    lengths, groups = mixed_lengths(count)
    wall, cpu = time.perf_counter(), time.process_time()
    packs = pack_lengths(lengths, np.arange(count), groups, PARAMS)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "fill": float(lengths.sum()) / (len(packs) * SEQ_LENGTH),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
