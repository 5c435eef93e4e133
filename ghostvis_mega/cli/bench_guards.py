"""`ghostvis bench guards`: what looking for NaN and loss spikes costs a step."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude, refusing_settings, scratch
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.logging import setup_logging

log = logging.getLogger(__name__)

BENCH_GUARDS_HELP = """Time, reads by the host and calls to other ranks that guards add to a step.

\b
Examples (a tiny model on a CPU; a 2 B model on one GPU, about two minutes):
  python -m ghostvis_mega bench guards examples/configs/vlm_tiny_easyvqa.yaml
  python -m ghostvis_mega bench guards examples/configs/vlm_1_5b_easyvqa.yaml --json

\b
Steps with and without guards are taken in turn. The share is measured inside the guarded ones: the
checks for numbers that are not finite (on GPUs by events around their kernels) and what is decided
on the host, with as many losses remembered as there will ever be. Its bar, 0.5 % of a step, holds
for steps from 0.1 s on. Under torchrun the run's layout is used on all processes.
Exit code: 0 within the bars, 1 not, 2 wrong settings.
"""


def bench_guards(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each kind.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Train with and without."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    setup_logging(rank=rank)
    with refusing_settings():
        run = load_checked(config, overrides or [], world_size=world_size)
    from ghostvis_mega.perf.guard_cost import measure_guards
    from ghostvis_mega.session import local_device, open_world

    device = local_device(run)
    with (
        scratch("bench", None) as folder,
        contextlib.redirect_stdout(sys.stderr),  # DeepSpeed prints what it builds
        open_world(run, device=device) as world,
    ):
        own = run.model_copy(update={"log": run.log.model_copy(update={"output": folder})})

        def progress(what: str) -> None:
            world.watchdog.alive(what)
            log.info("%s", what)

        rows = measure_guards(
            own, world.groups, device=device, calls=world.calls, steps=steps, progress=progress
        )
    conclude(rows, title=f"guards of {config}", as_json=as_json, show=rank == 0)
