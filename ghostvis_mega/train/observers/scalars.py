"""One flat table of a step's numbers, named alike in every tool that draws curves."""

import math

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import RunInfo, step_mfu


def step_scalars(m: StepMetrics, run: RunInfo) -> dict[str, float]:
    """All numbers of a step by `group/name`; `speed/mfu` is absent where the peak is unknown."""
    scalars = {
        "train/loss": m.loss,
        "train/grad_norm": m.grad_norm,
        "train/skipped": float(m.skipped),
        "batch/tokens": float(m.tokens),
        "batch/trained_tokens": float(m.trained_tokens),
        "batch/images": float(m.images),
        "batch/samples": float(m.samples),
        "speed/tokens_per_s": m.tokens_per_s,
        "speed/images_per_s": m.images_per_s,
        "speed/step_s": m.seconds,
    }
    scalars |= {f"lr/{name}": value for name, value in m.lr.items()}
    scalars |= {f"timing/{name}_s": value for name, value in m.timing.items()}
    scalars |= {f"dispatch/{name}": value for name, value in m.dispatch.items()}
    if math.isfinite(m.goodput):
        scalars["speed/goodput"] = m.goodput
    mfu = step_mfu(m, run)
    if mfu is not None:
        scalars["speed/mfu"] = mfu
    return scalars
