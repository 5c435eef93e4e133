"""The layouts that `perf.stress` goes through, and the settings of each."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.stress_data import SEQ_LENGTH, VOCAB

ROWS = 4
"""Sequences of a batch: one for each of four replicas."""


@dataclass(frozen=True)
class StressLayout:
    """One way to spread the model."""

    name: str
    stage: int
    """Of ZeRO; the vision engine has 2 where the LLM has 3."""
    parallel: dict[str, int] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Processes of one replica."""
        product = 1
        for key in ("tensor", "pipeline", "context"):
            product *= self.parallel.get(key, 1)
        return product


LAYOUTS = (
    StressLayout("zero1", 1),
    StressLayout("zero2", 2),
    StressLayout("zero3", 3),
    StressLayout("pp2", 1, {"pipeline": 2}),
    StressLayout("pp2-interleaved", 2, {"pipeline": 2, "virtual_pipeline": 2}),
    StressLayout("tp2", 2, {"tensor": 2}),
    StressLayout("tp2-pp2", 1, {"tensor": 2, "pipeline": 2}),
    StressLayout("cp2", 2, {"context": 2}),
    StressLayout("cp2-pp2", 2, {"context": 2, "pipeline": 2}),
)


@dataclass(frozen=True)
class StressJob:
    """What to do; the same on all ranks."""

    folder: Path
    """Has `data/`; takes traces, checkpoints and settings."""
    layouts: tuple[StressLayout, ...]
    steps: int
    """Over all layouts."""
    seed: int
    step_timeout_s: float
    fault: str | None = None
    """One of `FAULTS`, planted on rank 1 of each layout."""


def settings_of(layout: StressLayout, job: StressJob, *, steps: int, cuda: bool) -> RunConfig:
    """Settings of one layout; on GPUs sizes that their kernels take."""
    head, heads = (64, 4) if cuda else (8, 2)
    width = head * heads
    rare = max(1, min(500, steps // 2))
    files = {"llm": job.folder / f"zero{layout.stage}.json"}
    if layout.stage == 3:
        files["vision"] = job.folder / "zero2.json"
    return RunConfig.model_validate(
        {
            "model": {
                "llm": {
                    "num_layers": 2 * layout.parallel.get("virtual_pipeline", 1),
                    "hidden_size": width,
                    "num_heads": heads,
                    "num_kv_heads": 2,
                    "head_dim": head,
                    "ffn_hidden_size": 2 * width,
                    "vocab_size": VOCAB,
                    "max_positions": SEQ_LENGTH,
                },
                "vision": {
                    "kind": "siglip",
                    "num_layers": 1,
                    "hidden_size": width,
                    "num_heads": heads,
                    "ffn_hidden_size": width,
                    "image_size": 16,
                    "patch_size": 8,
                },
                "connector": {"kind": "avgpool_mlp", "tokens_per_image": 1},
            },
            "data": {
                "train": job.folder / "data" / "mixed.gvd",
                "heldout": job.folder / "data" / "heldout.gvd",
                "seq_length": SEQ_LENGTH,
                "packing": True,
            },
            "batch": {"global_size": ROWS},
            "parallel": layout.parallel,
            "deepspeed": files,
            "train": {
                "steps": steps,
                "seed": job.seed,
                # Kernels for packs compute in BF16 only on GPUs.
                "precision": "bf16" if cuda else "fp32",
                "timeout_s": job.step_timeout_s,
            },
            # Losses of so different batches scatter; only a poisoned one may be left out.
            "guards": {"spike": "none"},
            "checkpoint": {"save_every": rare, "save_at_end": False, "keep": 1},
            "log": {
                "output": job.folder / layout.name,
                "preview_steps": list(range(rare, steps + 1, rare)),
                "preview_samples": 2,
            },
        }
    )


def choose_layouts(names: str, *, processes: int) -> tuple[StressLayout, ...]:
    """Layouts by name, between commas; all that fit the processes where no name is given.

    Raises:
        ValueError: A name is unknown, or its layout does not fit.
    """
    fitting = {
        layout.name: layout
        for layout in LAYOUTS
        if processes % layout.ranks == 0 and ROWS % (processes // layout.ranks) == 0
    }
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(fitting)
    unknown = [name for name in wanted if name not in fitting]
    if unknown or not wanted:
        raise ValueError(
            f"{', '.join(unknown) or 'no layout'}: with {processes} processes there are "
            f"{', '.join(fitting) or 'none'}"
        )
    return tuple(fitting[name] for name in wanted)


def write_deepspeed_files(job: StressJob) -> None:
    """The DeepSpeed files that `settings_of` names, one a stage."""
    for stage in (1, 2, 3):
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 16384}
        if stage == 3:
            # By default DeepSpeed would keep all of these small parameters whole on every rank.
            zero["stage3_param_persistence_threshold"] = 64
        path = job.folder / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))


def split_steps(steps: int, layouts: int) -> list[int]:
    """Steps of each layout; the first take what does not divide."""
    share, extra = divmod(steps, layouts)
    return [share + (index < extra) for index in range(layouts)]
