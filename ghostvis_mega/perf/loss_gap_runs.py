"""Launches of one run that differ in a few settings, one after the other or at the same time."""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.utils.launch import (
    TRAIN_SCRIPT,
    RankError,
    RankHang,
    device_environment,
    started_ranks,
    wait_ranks,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One of the runs."""

    name: str
    settings: tuple[str, ...]
    """All that is set beside the file of settings, `log.output` among it."""
    folder: Path
    """New; takes what the ranks print."""


def train_variants(
    config: Path,
    variants: Sequence[Variant],
    *,
    processes: int,
    device: str,
    timeout_s: float,
    side_by_side: bool,
) -> dict[str, str]:
    """Train each as people start a run; none outlives the call.

    Args:
        config: YAML file of the run.
        variants: What to train. Where the first one fails, those not started yet are not needed.
        processes: Ranks of each.
        device: `cpu` hides GPUs from them.
        timeout_s: From the start of a launch to its end.
        side_by_side: All at the same time, on the same devices.

    Returns:
        Of those that failed or hung: what is known about it, by name.
    """
    failures: dict[str, str] = {}
    groups = [list(variants)] if side_by_side else [[variant] for variant in variants]
    for group in groups:
        began = time.monotonic()
        with ExitStack() as stack:
            running = []
            for variant in group:
                log.info("%s: %d ranks on %s", variant.name, processes, device)
                ranks = started_ranks(
                    [str(TRAIN_SCRIPT), "--config", str(config), *variant.settings],
                    ranks=processes,
                    fuse_s=timeout_s + 60,
                    folder=variant.folder,
                    environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
                    | device_environment(device),
                )
                running.append((variant, stack.enter_context(ranks)))
            for variant, ranks in running:
                try:
                    wait_ranks(variant.name, ranks, variant.folder, timeout_s, began=began)
                except (RankError, RankHang) as failure:
                    failures[variant.name] = str(failure)
                log.info("%s: ended after %.1f s", variant.name, time.monotonic() - began)
        if variants[0].name in failures:
            break
    return failures
