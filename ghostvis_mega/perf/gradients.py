"""First-step gradients of a run in any layout against those of one plain fp32 process.

Two runs of `python -m ghostvis_mega gradients`: one process writes the truth, then each layout is
compared with it. The distance of a one-GPU BF16 run to the truth is the rounding noise of BF16; a
layout is right when its own distance is about the same.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.inspect import reduced_gradient, relative_errors
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.groups import Groups, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.parallel.windows import own_pictures
from ghostvis_mega.perf.reference import PlainTrainer
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.utils.figures import Figure, at_most, measured
from ghostvis_mega.utils.worst import worst

log = logging.getLogger(__name__)

L2 = "relative L2"


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of a safetensors file, read one at a time when asked for."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_true_gradients(
    run: RunConfig, groups: Groups, path: Path, *, device: torch.device
) -> float:
    """Compute the first step's gradients in one plain fp32 process and store them; returns the
    loss."""
    batch, work = Feed(run, groups, Dataset.open(run.data.train)).get(0)
    pictures = own_pictures(work.windows, 0)
    trainer = PlainTrainer(run, groups, device=device)
    loss = trainer.backward(work.micro_batches, pictures)
    save_file({name: g.cpu().contiguous() for name, g in trainer.gradients().items()}, path)
    log.info(
        "loss %.6f, %d gradients in %s (%d sequences)",
        loss,
        len(trainer.trained),
        path,
        len(batch.sequences),
    )
    return loss


def compare_layouts(
    runs: Sequence[RunConfig],
    path: Path,
    *,
    device: torch.device,
    bar: float | None,
    progress: Callable[[str], None],
) -> list[Figure]:
    """Rows of name, value, unit, bar and ok for each layout, one after the other; collective.

    The joint error is the relative L2 distance of the whole gradient.

    Args:
        runs: One a layout; model, data and batch are those of the truth.
        path: File of `write_true_gradients`.
        device: Of this process.
        bar: Largest joint error that is fine; None holds to nothing, and `ok` is then None.
        progress: Told before each layout what is being done.
    """
    truth = StoredTensors(path)
    squares = {name: float(truth[name].double().square().sum()) for name in truth}
    whole = sum(squares.values())
    rows = []
    for run in runs:
        destroy_groups()
        degrees = Degrees.of(run, world_size=dist.get_world_size())
        layout = degrees.describe()
        progress(f"the gradients of {layout}")
        groups = build_groups(degrees, seed=run.train.seed)
        loss, errors = layout_errors(run, groups, truth, device=device)
        joint = sum(errors[name] ** 2 * squares[name] for name in errors) ** 0.5 / whole**0.5
        name, error = worst(errors.items())
        rows += [
            measured(f"{layout}: loss", loss, "nats"),
            at_most(f"{layout}: joint gradient", joint, L2, bar),
            measured(f"{layout}: median parameter", sorted(errors.values())[len(errors) // 2], L2),
            measured(f"{layout}: worst parameter, {name}", error, L2),
        ]
    return rows


def layout_errors(
    run: RunConfig, groups: Groups, truth: Mapping[str, torch.Tensor], *, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Loss of the first step and its gradients' relative L2 errors by name; collective."""
    engine = TrainEngine(run, groups, device=device)
    _, work = Feed(run, groups, Dataset.open(run.data.train)).get(0)
    loss_sum = engine.accumulate(work)
    errors = relative_errors(engine, truth, reduced_gradient(engine))
    result = engine.update(loss_sum, work, step=0)
    engine.close()
    return result.loss, errors
