"""What the plain process computed, in files: one rank writes, all ranks read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ghostvis_mega.engine.optimizer import module_of
from ghostvis_mega.perf.gradients import StoredTensors

TENSORS = ("gradients", "weights", "from_rounded")
"""Parts of a truth that are tensors by name, each in a file of its own."""


@dataclass(frozen=True)
class Truth:
    """Losses and norms of each step, the first gradient and the last weights by global name."""

    losses: list[float]
    norms: list[float]
    gradients: Mapping[str, torch.Tensor]
    """Of the first step, of what trains."""
    weights: Mapping[str, torch.Tensor]
    """After the last step, frozen ones included."""
    squares: dict[str, float]
    """Sum of squares of each gradient."""
    changes: dict[str, float]
    """Sum of squares of what all steps together changed of each weight."""
    from_rounded: Mapping[str, torch.Tensor]
    """Of a problem in BF16: where the same changes lead from the start as BF16 rounds it, which is
    where layouts in BF16 start. Else empty."""
    eps: float | None = None
    """AdamW's `eps`, where it was chosen by the size of the gradient."""

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the first gradient by module."""
        squares: dict[str, float] = {}
        for name, square in self.squares.items():
            squares[module_of(name)] = squares.get(module_of(name), 0.0) + square
        return {module: square**0.5 for module, square in squares.items()}


def write_truth(path: Path, truth: Truth) -> None:
    """Write a truth to `path` (JSON) and files of tensors beside it."""
    for part in TENSORS:
        tensors = {name: t.cpu().contiguous() for name, t in getattr(truth, part).items()}
        save_file(tensors, path.with_suffix(f".{part}.safetensors"))
    numbers = {
        "losses": truth.losses,
        "norms": truth.norms,
        "squares": truth.squares,
        "changes": truth.changes,
        "eps": truth.eps,
    }
    path.write_text(json.dumps(numbers))


def read_truth(path: Path) -> Truth:
    """Read a truth; its tensors are read when asked for."""
    tensors = {part: StoredTensors(path.with_suffix(f".{part}.safetensors")) for part in TENSORS}
    return Truth(**json.loads(path.read_text()), **tensors)
