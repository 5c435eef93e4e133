"""`ghostvis gradients`: a run's first-step gradients in any layout against plain fp32 ones."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude, refusing_settings
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.logging import setup_logging

GRADIENTS_HELP = """Compare first-step gradients of layouts with those of one plain fp32 process.

\b
Examples (the first writes the truth on one device, the second compares two layouts with it):
  python -m ghostvis_mega gradients RUN.yaml --write-truth truth.safetensors
  torchrun --nproc-per-node 4 -m ghostvis_mega gradients RUN.yaml --truth truth.safetensors \\
    --layout parallel.tensor=2 --layout "parallel.tensor=2 parallel.pipeline=2"

\b
Beside `certify`, which also takes steps, compares weights and has bars of its own: the truth needs
no optimizer states, is kept in a file, and layouts may span machines that see that file.
With context parallelism both need data.segment_align=2N, so that they read the same packs.
The distance of a one-GPU BF16 run is BF16's own rounding noise; a right layout has about the same.
Exit code: 0 fine, 1 a joint error is above --bar, 2 wrong settings.
"""


def gradients(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    write_truth: Annotated[Path | None, typer.Option(help="Write the truth to this file.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Compare with the truth in this file.")] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="Overrides of one layout, between blanks; repeatable.")
    ] = None,
    bar: Annotated[float | None, typer.Option(help="Largest joint error that is fine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write or compare first-step gradients."""
    if (write_truth is None) == (truth is None):
        raise typer.BadParameter("give one of --write-truth FILE and --truth FILE")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if truth is not None and not truth.is_file():
        raise typer.BadParameter(f"{truth} is not a file: write it with --write-truth first")
    if write_truth is not None and world_size > 1:
        raise typer.BadParameter("--write-truth runs in one process")
    setup_logging(rank=rank)
    with refusing_settings():
        runs = [
            load_checked(config, [*(overrides or []), *text.split()], world_size=world_size)
            for text in layout or [""]
        ]
    from ghostvis_mega.perf.gradients import compare_layouts, write_true_gradients
    from ghostvis_mega.session import local_device, open_world

    with open_world(runs[0], device=local_device(runs[0])) as world:
        if write_truth is not None:
            write_true_gradients(runs[0], world.groups, write_truth, device=world.device)
            return
        assert truth is not None
        rows = compare_layouts(
            runs, truth, device=world.device, bar=bar, progress=world.watchdog.alive
        )
    if rank == 0:
        conclude(rows, title=f"gradients against {truth}", as_json=as_json)
