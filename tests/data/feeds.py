"""A feed of one rank without process groups, a small blend for it, and a hash of a step."""

import hashlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.data.batch import GlobalBatch
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.order import hash_u64
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.perf.synthetic_data import write_synthetic
from ghostvis_mega.train.feed import Feed

ROOT = Path(__file__).resolve().parents[2]
RUN = """\
model: {{preset: vlm_tiny}}
data:
  train: {folder}/a.gvd
  seq_length: 256
  augment: true
  blend: [{{path: {folder}/a.gvd, weight: 0.8}}, {{path: {folder}/b.gvd, weight: 0.2}}]
  blend_changes: [{{step: 30, weights: [1, 1]}}]
batch: {{global_size: 24}}
deepspeed: {{llm: {root}/ds_configs/zero1.json}}
train: {{steps: 1000000, seed: 3}}
log: {{output: {folder}/run}}
"""


def jpeg(seed: int, *, width: int = 40, height: int = 30) -> bytes:
    """A noisy JPEG of 8x8 blocks."""
    noise = hash_u64(np.arange(width // 8 * (height // 8 + 1) * 3), seed) % np.uint64(256)
    small = noise.astype(np.uint8).reshape(height // 8 + 1, width // 8, 3)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_blend(folder: Path) -> None:
    """Two datasets, 400 samples with pictures and 150 without some, and `run.yaml` for them."""
    for number, (name, count) in enumerate((("a", 400), ("b", 150))):
        noise = hash_u64(np.arange(count), number).astype(np.int64) & 0xFFFF
        write_synthetic(
            folder / f"{name}.gvd",
            text_lengths=8 + noise % 61,
            image_of=np.where(noise % (5 - 2 * number) == 0, -1, noise % 20),
            pictures=[(jpeg(100 * number + k), 40, 30) for k in range(20)],
            vocab_size=400,
            seed=number,
        )
    (folder / "run.yaml").write_text(RUN.format(folder=folder, root=ROOT))


def open_feed(
    folder: Path, *overrides: str, rank: int = 0, data_parallel: int = 1, workers: int = 0
) -> Feed:
    """The feed of `rank` of `data_parallel` ranks, every one a replica."""
    run = load_run_config(folder / "run.yaml", [*overrides, f"data.num_workers={workers}"])
    places = tuple(Place(data=r, pipeline=0, tensor=0) for r in range(data_parallel))
    groups: Any = SimpleNamespace(
        rank=rank,
        place=places[rank],
        places=places,
        degrees=SimpleNamespace(data=data_parallel, tensor=1, pipeline=1, context=1),
        is_first_stage=True,
        is_last_stage=True,
    )
    return Feed(run, groups, Dataset.open(run.data.train))


def step_hash(batch: GlobalBatch, work: StepInput) -> str:
    """SHA-256 over every tensor, picture and id that a rank gets for a step."""
    (window,) = work.windows
    digest = hashlib.sha256(repr((batch, window.dispatch, work.trained_tokens)).encode())
    for micro in work.micro_batches:
        for name in ("tokens_BS", "labels_BS", "weights_BS", "positions_BS", "cu_seqlens"):
            tensor = getattr(micro, name)
            assert isinstance(tensor, torch.Tensor)
            digest.update(tensor.numpy().tobytes())
        digest.update(repr((micro.images, micro.sample_ids)).encode())
    digest.update(window.pixels_N3hw.numpy().tobytes())
    return digest.hexdigest()
