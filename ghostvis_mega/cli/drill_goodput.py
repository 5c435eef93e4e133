"""`ghostvis drill goodput`: kill a run again and again; most of its time must still be training."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude
from ghostvis_mega.utils.imports import many_imports
from ghostvis_mega.utils.launch import device_environment, started_ranks
from ghostvis_mega.utils.logging import setup_logging

DRILL_GOODPUT_HELP = """Train on a CPU, kill all ranks every so often, start them again; account for
the time.

\b
Examples (10 minutes; 3 minutes):
  python -m ghostvis_mega drill goodput
  python -m ghostvis_mega drill goodput --seconds 180 --kill-every 90 --json

\b
Each launch resumes from the newest checkpoint by itself. The figures are those that a run keeps in
goodput.jsonl and shows in its report; --folder keeps both.
Exit code: 0 all bars are kept, 1 one is missed or a rank failed.
"""
FOLDER_VARIABLE = "GHOSTVIS_DRILL_FOLDER"


def drill_goodput(
    seconds: Annotated[float, typer.Option(min=10, help="Of the whole drill.")] = 600.0,
    kill_every: Annotated[float, typer.Option(min=5, help="Seconds between kills.")] = 60.0,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 2,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 25,
    folder: Annotated[Path | None, typer.Option(help="New folder to keep the run in.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start the ranks again and again, or be one of them."""
    own = os.environ.get(FOLDER_VARIABLE)
    if own is not None:
        _be_a_rank(Path(own), save_every=save_every)
        return
    if folder is not None and folder.exists():
        raise typer.BadParameter(f"{folder} exists: name a new folder", param_hint="--folder")
    from ghostvis_mega.perf.goodput_drill import figures_of, prepare

    with tempfile.TemporaryDirectory(prefix="ghostvis-goodput-") as temporary:
        place = folder or Path(temporary)
        prepare(place)
        kills = _run(place, seconds=seconds, kill_every=kill_every, processes=processes)
        rows = figures_of(place, kills=kills)
    title = f"{seconds:g} s, killed every {kill_every:g} s"
    conclude(rows, title=title, as_json=as_json)


def _run(place: Path, *, seconds: float, kill_every: float, processes: int) -> int:
    """All launches; returns the number of those that were killed."""
    began, launches = time.monotonic(), 0
    environment = {FOLDER_VARIABLE: str(place), "OMP_NUM_THREADS": "1"}
    # A launch that is killed while it still imports would leave no trace.
    while (left := seconds - (time.monotonic() - began)) >= kill_every / 2:
        ranks = place / f"ranks{launches}"
        with started_ranks(
            ["-m", "ghostvis_mega", *sys.argv[1:]],
            ranks=processes,
            fuse_s=kill_every + 60,
            folder=ranks,
            environment=environment | device_environment("cpu"),
        ) as running:
            launches += 1
            try:
                code = running[0].wait(timeout=min(kill_every, left))
            except subprocess.TimeoutExpired:
                continue  # and so be killed
        typer.echo(f"rank 0 ended by itself with {code}; its output is:", err=True)
        typer.echo((ranks / "output0.txt").read_text(errors="replace")[-4000:], err=True)
        raise typer.Exit(1)
    return launches


def _be_a_rank(place: Path, *, save_every: int) -> None:
    setup_logging(rank=int(os.environ["RANK"]))
    with many_imports():
        import torch

        from ghostvis_mega.perf.goodput_drill import drill_run
        from ghostvis_mega.session import Training, local_device, open_world

    torch.set_num_threads(1)
    run = drill_run(place, save_every=save_every)
    with open_world(run, device=local_device(run)) as world:
        Training(run, world).execute()
