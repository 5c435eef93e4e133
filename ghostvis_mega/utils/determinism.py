"""One switch for runs that give the same bits every time, on the CPU and on GPUs.

What can differ between two equal runs: kernels that add in the order in which threads come, the
choice between kernels by timing, reductions cut by the number of CPU threads, and collectives whose
order of adding depends on the network's algorithm. The data, the initial values and the random
states of a run depend on its seed alone already.
"""

import logging
import os
from collections.abc import Mapping

from ghostvis_mega.utils.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLES = {
    # cuBLAS: a workspace of its own for each stream; without one, streams share and race.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Transformer Engine: attention backward without atomic adds.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # NCCL: switches (NVLink SHARP, CollNet) add in an order of their own.
    "NCCL_ALGO": "^NVLS,NVLSTree,CollNetDirect,CollNetChain",
    # MKL: the same code path whatever the alignment of the data.
    "MKL_CBWR": "AUTO,STRICT",
}
"""Environment variables of a deterministic run, with the values that they get if not set."""

_ALLOWED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}

_IN_THE_SWITCH = {"nvls", "nvlstree", "collnetdirect", "collnetchain"}
_ON_THE_GPUS = {"ring", "tree", "pat"}
"""NCCL's algorithms by where they add; NCCL ignores case."""


def environment_problems(environment: Mapping[str, str]) -> list[str]:
    """Variables that somebody has set to what a deterministic run cannot have, as sentences."""
    problems = []
    for name, allowed in _ALLOWED.items():
        value = environment.get(name)
        if value is not None and value not in allowed:
            problems.append(
                f"train.deterministic=true, but the environment has {name}={value}. Unset it, or "
                f"use {' or '.join(allowed)}."
            )
    algorithms = environment.get("NCCL_ALGO")
    if algorithms is not None and not _adds_on_the_gpus(algorithms):
        problems.append(
            f"train.deterministic=true, but the environment has NCCL_ALGO={algorithms}, which does "
            "not rule out sums inside switches, in an order of their own. Unset it, or use "
            f"Ring, Tree or {VARIABLES['NCCL_ALGO']}."
        )
    return problems


def _adds_on_the_gpus(algorithms: str) -> bool:
    """Whether a value of NCCL_ALGO certainly leaves no algorithm that adds in a switch.

    Unknown names do not count, nor do lists for single functions (`allreduce:Ring`): they leave the
    other functions free.
    """
    names = set(algorithms.lower().removeprefix("^").split(","))
    if algorithms.startswith("^"):
        return _IN_THE_SWITCH <= names <= _IN_THE_SWITCH | _ON_THE_GPUS
    return names <= _ON_THE_GPUS


def make_deterministic() -> None:
    """Let this process compute reproducibly from now on; before anything uses CUDA.

    Operations that have no reproducible kernel then raise an error that names them.

    Raises:
        ConfigError: The environment asks for the contrary, or CUDA is in use already.
    """
    import torch

    problems = environment_problems(os.environ)
    if torch.cuda.is_initialized():
        problems.append(
            "train.deterministic=true must be set before this process uses CUDA: cuBLAS has chosen "
            "its workspace. Start the run by itself."
        )
    if problems:
        raise ConfigError(problems)
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Sums on the CPU are cut by the number of threads, which differs between machines.
    torch.set_num_threads(1)
    log.info("deterministic: %s", ", ".join(f"{k}={v}" for k, v in determinism().items()))


def determinism() -> dict[str, str]:
    """What decides whether this process computes reproducibly, as it stands."""
    import torch

    return {
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "cudnn.deterministic": str(torch.backends.cudnn.deterministic),
        "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        "cpu_threads": str(torch.get_num_threads()),
    } | {name: os.environ.get(name, "not set") for name in VARIABLES}
