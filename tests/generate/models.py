"""Small models in every format, their engines, and pictures to ask them about."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.data.images import load_image
from ghostvis_mega.generate.engine import Engine, Request
from ghostvis_mega.generate.load import load_model
from ghostvis_mega.generate.sampling import Sampling
from tests.convert.cases import IMAGE, build, save

CPU = torch.device("cpu")
SIDE = 16
OPTIONS = ExportOptions(assets=Assets(tokens={"image": IMAGE, "eos": 2, "pad": 0}))
PROMPTS: list[tuple[list[int], tuple[int, ...]]] = [
    ([7, 30, 41, 9, 100, 64], ()),
    ([7, IMAGE, 30, 41], (0,)),
    ([IMAGE, 8, IMAGE, 19, 23, IMAGE, 77], (2, 1, 0)),
]
"""Tokens with one sentinel a picture, and which pictures."""


def png(seed: int, side: int = SIDE) -> bytes:
    """A picture of noise."""
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


PICTURES = [png(seed) for seed in range(3)]


def pixels(ids: Sequence[int]) -> torch.Tensor | None:
    """uint8 [n, 3, SIDE, SIDE] of some pictures; None of none."""
    found = [load_image(PICTURES[i], image_size=SIDE, augment_seed=None) for i in ids]
    return torch.stack(found) if found else None


def request(prompt: tuple[list[int], tuple[int, ...]], **sampling: Any) -> Request:
    """One of `PROMPTS` as a request."""
    tokens, ids = prompt
    return Request(tuple(tokens), tuple(PICTURES[i] for i in ids), Sampling(**sampling))


class Made(dict[str, tuple[Path, Path]]):
    """(checkpoint, export) by the names of `tests.convert.cases`; made when first asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> tuple[Path, Path]:
        source = save(build(name), self.folder / name)
        native = import_hf([source], self.folder / f"{name}-native", ImportOptions())
        self[name] = native, export_hf(native, self.folder / f"{name}-out", OPTIONS)
        return self[name]


def engine_of(path: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    """The model on the CPU."""
    loaded = load_model(path, device=CPU, dtype=dtype)
    return Engine(loaded, image_token=IMAGE, **options)
