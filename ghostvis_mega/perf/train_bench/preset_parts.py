"""What presets of the training benchmark are made of: sizes, and the settings of one row."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_mega.utils.launch import PACKAGES

DEEPSPEED = PACKAGES / "ds_configs"
MICRO_TOKENS = 8192
"""Of one micro-batch, ours and peers'."""
LARGE_TOKENS = 2 * MICRO_TOKENS
"""Of one where memory allows it."""
STEP_TOKENS = 16 * 4096
"""Of one step, for each process."""
TEXT_TOKENS = 2**23
"""Of a preset's text: whole packs of any length, so that no step has a pack that is half empty."""
RECIPES = ("delayed", "tensorwise", "blockwise")
UNFUSED = ("train.fused_wgrad=false", "train.fused_loss=false", "train.fused_rope=false")
"""What is on until it is asked not to be."""
ROWS, NAIVE_ROWS = 192, 32
"""Samples with pictures of a step, for each process: about as many tokens as ours; the naive
baseline would take minutes for those, and loses little by its more frequent updates."""
NAIVE_LENGTH = 2048
"""Longest row of the naive baseline; each micro-batch is padded to its own longest."""


@dataclass(frozen=True)
class Size:
    """One model size."""

    text: str
    vision: str
    tensor: int
    """Of our and Megatron-Core's rows."""
    processes: tuple[int, ...]
    vocab_size: int
    tflops: float
    """Promised, of text in BF16."""
    fp8: float
    """Promised speed of FP8 over BF16."""
    vision_ratio: float
    """Promised efficiency with pictures over that of text."""
    zero: str
    """DeepSpeed file of the transformers peer."""
    recompute: str
    """Of the transformers peer."""


SIZES = {
    "7b": Size("qwen25_7b", "vlm_7b", 2, (2, 4), 152_064, 528, 1.35, 0.95, "zero3.json", "full"),
    "1.5b": Size(
        "qwen25_1_5b", "vlm_1_5b", 1, (1, 2, 4), 151_936, 400, 1.0, 0.90, "zero1.json", "none"
    ),
}


def base_settings(model: str, *, precision: str = "bf16") -> dict[str, Any]:
    """A run file's content; rows name their data, the command the output and the steps."""
    return {
        "model": {"preset": model},
        "data": {"train": "unset", "seq_length": MICRO_TOKENS, "num_workers": 2},
        "batch": {"global_size": 1},
        "optim": {"schedule": "constant"},
        "deepspeed": {"llm": str(DEEPSPEED / "zero2.json")},
        "train": {"steps": 1, "precision": precision},
        "log": {"output": "unset"},
    }


def pack_settings(count: int, length: int, data: Path, *more: str, algorithm: str = "bfd") -> tuple:
    """Settings of a row of ours."""
    return (
        f"data.train={data}",
        f"data.seq_length={length}",
        f"data.pack_algorithm={algorithm}",
        f"batch.global_size={count}",
        *more,
    )


def rows_of_one(count: int, length: int, micro: int, data: Path, *more: str) -> tuple:
    """Settings of a peer's row: one sample each."""
    return (
        f"data.train={data}",
        "data.packing=false",
        f"data.seq_length={length}",
        f"batch.global_size={count}",
        f"batch.micro_size={micro}",
        *more,
    )


HF = "hf+liger"
"""The transformers peer at its best: with Liger's kernels."""
