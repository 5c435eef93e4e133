"""One layout of a training problem, and the short hands that layouts are written with.

Needs no torch, so that layouts can be listed at once.
"""

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]
Sections = dict[str, Settings]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to run one training problem on the world; what no degree names is data-parallel."""

    name: str
    ranks: int = 4
    """Processes it needs."""
    stage: int = 1
    """ZeRO stage; see `problem.make_run`."""
    overlap: bool = False
    """DeepSpeed's `overlap_comm`."""
    vision_stage: int | None = None
    """The vision engine's own ZeRO stage; None: the LLM's, but never 3."""
    offload: tuple[str, ...] = ()
    """Engines (llm, vision) whose optimizer is on the host."""
    kind: str = "mixed"
    """Pictures of the batch; see `problem.SHOWN`."""
    align: int = 1
    """Segments of packed rows end at multiples of this: context parallelism cuts each evenly."""
    problem: Sections = field(default_factory=dict)
    """Settings that define what is computed; the reference shares them."""
    split: Sections = field(default_factory=dict)
    """Settings of how it is computed."""


def merge(base: Settings, over: Settings) -> Settings:
    """`base` with the values of `over`, section by section."""
    out = dict(base)
    for key, value in over.items():
        out[key] = (
            merge(out[key], value)
            if isinstance(value, dict) and isinstance(out.get(key), dict)
            else value
        )
    return out


def parallel(
    tensor: int = 1, pipeline: int = 1, virtual_pipeline: int = 1, **more: Any
) -> Settings:
    """The settings' section of parallel degrees."""
    return {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual_pipeline, **more}
