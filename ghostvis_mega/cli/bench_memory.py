"""`ghostvis bench memory`: peak GPU memory of a run under different modes."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude, refusing_settings
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.logging import setup_logging

MODES = (
    "no checkpointing: train.recompute=none",
    "selective: train.recompute=selective",
    "full: train.recompute=full",
    "tower graphs kept: train.recompute=none tower.backward=keep",
)

BENCH_MEMORY_HELP = """Peak GPU memory and step time of a run, mode after mode in one launch.

\b
Examples (one GPU; four modes of a 2 B model take about three minutes):
  python -m ghostvis_mega bench memory examples/configs/vlm_1_5b_easyvqa.yaml
  python -m ghostvis_mega bench memory RUN.yaml batch.global_size=2 \\
    --mode "full: train.recompute=full" --mode "frozen LLM: train.freeze=[llm]"

\b
A mode is NAME: followed by settings. Under torchrun the run's layout is used on all processes.
Exit code: 0 measured, 1 a mode found the memory of another, 2 wrong settings or no GPU.
"""


def bench_memory(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help='"NAME: settings"; repeatable.', show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each mode.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure memory mode by mode."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    setup_logging(rank=rank)
    import torch

    if not torch.cuda.is_available():
        typer.echo(
            "bench memory reads the CUDA allocator, but PyTorch sees no CUDA device. Run it on a "
            "machine with a GPU.",
            err=True,
        )
        raise typer.Exit(EXIT_WRONG_SETTINGS)
    chosen = [split_mode(text) for text in mode or MODES]
    with refusing_settings():
        runs = [
            load_checked(config, [*(overrides or []), *more], world_size=world_size)
            for _, more in chosen
        ]
    from ghostvis_mega.perf.bench_memory import Mode, measure_memory
    from ghostvis_mega.session import local_device, open_world

    modes = [Mode(name, run) for (name, _), run in zip(chosen, runs, strict=True)]
    with open_world(runs[0], device=local_device(runs[0])) as world:
        rows = measure_memory(
            modes, device=world.device, steps=steps, progress=world.watchdog.alive
        )
    if rank == 0:
        conclude(rows, title=f"memory of {config}", as_json=as_json)


def split_mode(text: str) -> tuple[str, list[str]]:
    """("NAME", settings) of "NAME: settings"."""
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise typer.BadParameter(
            f'{text!r} has no name: write "NAME: section.key=value ..."', param_hint="--mode"
        )
    return name.strip(), rest.split()
