"""Whether two equal runs give equal bits, and what that costs."""

import hashlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.inspect import owned_parameters
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.train.damage import agree_on_damage
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.utils.figures import Figure, at_most, measured

_WARM_UP = 2
"""First steps, whose time does not count."""


class Bits(TypedDict):
    """What a run came to, to the last bit."""

    losses: list[str]
    """Of each step, as `float.hex`."""
    norms: list[str]
    state: str
    """SHA-256 of all ranks' weights and optimizer states at the end."""
    step_s: float
    """Median of a step's time."""


def run_bits(
    run: RunConfig,
    groups: Groups,
    *,
    device: torch.device,
    steps: int,
    progress: Callable[[str], None],
    noise: bool = False,
) -> Bits:
    """Train the first steps of a run; collective.

    Args:
        run: Settings.
        groups: Of this rank.
        device: Of this rank.
        steps: How many.
        progress: Told what is being done.
        noise: Spoil the last bits of every loss, as a kernel would that adds in any order.
    """
    engine = TrainEngine(run, groups, device=device)
    if noise:
        add_noise(engine)
    feed = Feed(run, groups, Dataset.open(run.data.train))
    losses, norms, seconds = [], [], []
    for step in range(steps):
        progress(f"step {step + 1}")
        batch, work = feed.get(step)
        work = agree_on_damage(batch, work, feed.corpus, groups, device=device)
        began = time.perf_counter()
        result = engine.step(work, step=step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        losses.append(result.loss.hex())
        norms.append(result.grad_norm.hex())
    feed.close()
    state = state_digest(engine)
    engine.close()
    timed = seconds[_WARM_UP:] or seconds
    return Bits(losses=losses, norms=norms, state=state, step_s=statistics.median(timed))


def add_noise(engine: TrainEngine) -> None:
    """Change the last bits of the loss at random."""
    chunk = engine.parts.chunks[-1]
    honest, draw = chunk.loss_sum, random.SystemRandom()

    def loss_sum(*args: Any, expected_grad: float) -> torch.Tensor:
        factor = 1.0 + draw.randrange(1, 64) * 2.0**-22
        # The fused loss makes its gradients at once, for the gradient that it will get.
        return honest(*args, expected_grad=expected_grad * factor) * factor

    chunk.loss_sum = loss_sum


def state_digest(engine: TrainEngine) -> str:
    """SHA-256 over every rank's weights, master weights and optimizer states; collective."""
    digest = hashlib.sha256()
    for tensor in _state(engine):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(str((flat.dtype, flat.numel())).encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, digest.hexdigest())
    return hashlib.sha256("".join(map(str, gathered)).encode()).hexdigest()


def _state(engine: TrainEngine) -> Iterator[torch.Tensor]:
    for _, parameter in owned_parameters(engine):
        # ZeRO-3 keeps its part of a weight apart; the parameter itself is gathered as it comes.
        yield getattr(parameter, "ds_tensor", parameter)
    for zero in engine.engines:
        adamw = getattr(zero.optimizer, "optimizer", zero.optimizer)
        for group in adamw.param_groups:
            yield from group["params"]
        for state in adamw.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def compare_bits(first: Bits, second: Bits, plain: Bits) -> list[Figure]:
    """Rows of name, value, unit, bar and ok.

    Args:
        first: A run with the switch.
        second: The same run again.
        plain: The run without the switch.
    """
    rows = []
    for name in ("losses", "norms"):
        differing = sum(a != b for a, b in zip(first[name], second[name], strict=True))
        what = f"{name} that differ between two runs with the switch"
        rows.append(at_most(what, differing, "steps", 0))
    same = first["state"] == second["state"]
    rows += [
        measured("weights and optimizer states, first run", first["state"][:16], "SHA-256"),
        measured(
            "weights and optimizer states, second run", second["state"][:16], "SHA-256", ok=same
        ),
        measured("weights and optimizer states, without", plain["state"][:16], "SHA-256"),
        measured("last loss with the switch", float.fromhex(first["losses"][-1]), "nats"),
        measured("last loss without", float.fromhex(plain["losses"][-1]), "nats"),
    ]
    switched = min(first["step_s"], second["step_s"])
    return rows + [
        measured("step with the switch", switched, "s"),
        measured("step without", plain["step_s"], "s"),
        measured("cost of the switch", 100 * (switched / plain["step_s"] - 1), "% of step time"),
    ]
