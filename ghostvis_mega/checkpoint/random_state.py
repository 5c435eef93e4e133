"""States of every random generator of a process, as tensors and texts."""

import json
import logging
import random
from collections.abc import Mapping

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

log = logging.getLogger(__name__)

_TRACKED = "megatron/"


def capture_random_state() -> tuple[list[tuple[str, torch.Tensor]], dict[str, str]]:
    """Tensors and texts that `restore_random_state` takes."""
    version, numbers, next_gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = [
        ("torch/cpu", torch.get_rng_state()),
        ("python/numbers", torch.tensor(numbers, dtype=torch.int64)),
        ("numpy/keys", torch.from_numpy(keys.astype(np.int64))),
    ]
    if torch.cuda.is_available():
        tensors.append(("torch/cuda", torch.cuda.get_rng_state()))
    tracked = get_cuda_rng_tracker().get_states()
    tensors += [(f"{_TRACKED}{name}", state) for name, state in sorted(tracked.items())]
    texts = {
        "python": json.dumps({"version": version, "next_gauss": next_gauss}),
        "numpy": json.dumps(
            {"kind": kind, "position": position, "has_gauss": has_gauss, "cached": cached}
        ),
    }
    return tensors, texts


def restore_random_state(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    """Put every generator back to where it was."""
    python, numpy = json.loads(texts["python"]), json.loads(texts["numpy"])
    numbers = tuple(tensors["python/numbers"].tolist())
    random.setstate((python["version"], numbers, python["next_gauss"]))
    keys = tensors["numpy/keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(tensors["torch/cpu"])
    if ("torch/cuda" in tensors) != torch.cuda.is_available():
        log.warning("the checkpoint is from another kind of device: CUDA's generator starts anew")
        return
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["torch/cuda"])
    tracked = {k.removeprefix(_TRACKED): v for k, v in tensors.items() if k.startswith(_TRACKED)}
    get_cuda_rng_tracker().set_states(tracked)
