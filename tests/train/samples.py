"""Steps, runs and previews for the tests of this folder."""

import struct
import zlib
from typing import Any

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers import Preview, RunInfo


def make_step(**changes: Any) -> StepMetrics:
    """A plausible step; keyword arguments replace fields."""
    fields: dict[str, Any] = {
        "step": 12,
        "loss": 1.25,
        "grad_norm": 0.875,
        "skipped": False,
        "lr": {"llm": 1e-3, "vision": 1e-4, "projector": 5e-4},
        "tokens": 8000,
        "trained_tokens": 900,
        "images": 300,
        "samples": 420,
        "seconds": 0.5,
        "timing": {"data": 0.01, "vision": 0.1, "llm": 0.3},
        "flops_llm": 1e11,
        "flops_vision": 2e10,
        "dispatch": {"imbalance": 1.04, "sent_mean": 3e6, "sent_max": 5e6, "local_share": 0.5},
    }
    return StepMetrics(**(fields | changes))


def make_run(**changes: Any) -> RunInfo:
    """A plausible run; keyword arguments replace fields."""
    fields: dict[str, Any] = {
        "total_steps": 100,
        "start_step": 0,
        "name": "tiny",
        "model": "vlm_tiny",
        "parameters": {"llm": 2_650_000, "vision": 812_000},
        "layout": "TP 1 x PP 1 x DP 2, ZeRO-1",
        "device": "CPU",
        "num_devices": 2,
        "peak_flops": None,
        "precision": "fp32",
        "settings": {"train": {"steps": 100, "freeze": []}, "data": {"train": "a/b.gvd"}},
        "versions": {"torch": "2.14.1"},
    }
    return RunInfo(**(fields | changes))


def make_png(width: int, height: int, *, grey: int = 128) -> bytes:
    """A grey PNG, written by hand so that no image library is needed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = (b"\0" + bytes([grey]) * width) * height
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def make_preview(**changes: Any) -> Preview:
    """A right answer about one small picture; keyword arguments replace fields."""
    fields: dict[str, Any] = {
        "images_png": (make_png(64, 64),),
        "question": "what colour is it?",
        "answer": "red",
        "truth": "red",
    }
    return Preview(**(fields | changes))
