"""`ghostvis bench generate`: our generation against transformers' on the same weights."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude, scratch
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.logging import setup_logging

BENCH_GENERATE_HELP = """Time generation against that of transformers, on the same weights.

\b
Examples (one GPU: under 5 minutes and 4 GB of disk; a CPU: the small model, seconds):
  python -m ghostvis_mega bench generate
  python -m ghostvis_mega bench generate --preset tiny --tokens 16 --rounds 1

\b
Random weights of Qwen2.5-1.5B with SigLIP-B/32, in BF16 on a GPU. Calls alternate; medians count.
On a GPU ours must be at least twice as fast at batch 1; in fp32 all greedy tokens must be equal.
Exit code: 0 every bar is met, 1 one is missed.
"""


class Preset(StrEnum):
    """Models that can be measured."""

    vlm_1_5b = "vlm_1_5b"
    tiny = "tiny"


def bench_generate(
    preset: Annotated[Preset, typer.Option(help="Sizes of the model.")] = Preset.vlm_1_5b,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each kind.")] = 3,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts side by side; repeatable; 1 and 32.")
    ] = None,
    step_limit: Annotated[float, typer.Option(help="Seconds that any step may take.")] = 120.0,
    fused: Annotated[bool, typer.Option(help="Use the fused kernels on a GPU.")] = True,
    folder: Annotated[Path | None, typer.Option(help="Where there is room.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure generation."""
    setup_logging(rank=0)
    import torch

    from ghostvis_mega.generate.bench import Plan, bench_generate_rows
    from ghostvis_mega.utils.environment import package_versions
    from ghostvis_mega.utils.hardware import cpu_name

    logging.getLogger("transformers").setLevel(logging.ERROR)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name(0) if on_gpu else cpu_name()
    versions = ", ".join(f"{key} {value}" for key, value in package_versions().items())
    typer.echo(f"device: {name}; {versions}", err=True)
    plan = Plan(
        preset=preset.value,
        device=device,
        tokens=tokens,
        rounds=rounds,
        batches=tuple(batch or (1, 32)),
        step_limit_s=step_limit,
        fused=fused,
    )
    try:
        with scratch("bench", folder) as place:
            rows = bench_generate_rows(plan, place)
    except GhostVisError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    conclude(rows, title=f"generation, {preset.value} on {name}", as_json=as_json)
