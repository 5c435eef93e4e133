"""Activation checkpointing chosen by memory: what `train.recompute=auto` comes to."""

import logging

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.memory import (
    MODES,
    USABLE,
    Memory,
    Recompute,
    predict,
    refusal,
    unpredictable,
)
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.errors import ConfigError

log = logging.getLogger(__name__)

_GIB = 2**30


def settle_recompute(
    run: RunConfig, groups: Groups, *, device: torch.device, pictures: int
) -> RunConfig:
    """The run with `auto` replaced, alike on all ranks; collective on GPUs.

    A CPU's memory is not predicted: nothing is run again there.

    Args:
        run: Settings with `train.recompute=auto`.
        groups: Of this rank.
        device: Of this rank.
        pictures: Most that a rank encodes at a time; see `predict`.

    Raises:
        ConfigError: The memory of such a run cannot be predicted.
    """
    if device.type != "cuda":
        return _with(run, "none")
    world_size = groups.degrees.world_size
    if why := unpredictable(run, world_size=world_size):
        raise ConfigError([refusal(why)])
    total = torch.cuda.get_device_properties(device).total_memory // run.train.ranks_per_gpu
    # Ranks that run layers again wait for each other there, so the smallest GPU decides for all.
    smallest = torch.tensor(total, dtype=torch.int64, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=groups.world)
    return _with(run, choose(run, int(smallest), world_size=world_size, pictures=pictures))


def choose(run: RunConfig, total: int, *, world_size: int, pictures: int) -> Recompute:
    """The fastest that fits into a GPU of `total` bytes; where nothing does, what takes least."""
    needs: dict[Recompute, Memory] = {
        mode: predict(run, mode, world_size=world_size, pictures=pictures) for mode in MODES
    }
    fitting = [mode for mode, need in needs.items() if need.total <= USABLE * total]
    told = ", ".join(f"{mode} {need.total / _GIB:.1f} GiB" for mode, need in needs.items())
    words = (
        "train.recompute=auto: %s takes least; %s, with up to %d pictures at a time, of %.1f GiB"
    )
    if fitting:
        words = words.replace("takes least", "is the fastest that fits")
        log.info(words, fitting[0], told, pictures, total / _GIB)
        return fitting[0]
    least = min(needs, key=lambda mode: needs[mode].total)
    log.warning(f"{words}: out of memory is likely", least, told, pictures, total / _GIB)
    return least


def _with(run: RunConfig, recompute: Recompute) -> RunConfig:
    return run.model_copy(update={"train": run.train.model_copy(update={"recompute": recompute})})
