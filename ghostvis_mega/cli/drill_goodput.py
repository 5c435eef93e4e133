"""`ghostvis drill goodput`: kill a run again and again; most of its time must still be training."""

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude
from ghostvis_mega.utils.launch import (
    TRAIN_SCRIPT,
    RankError,
    RankHang,
    device_environment,
    run_ranks,
    started_ranks,
)

DRILL_GOODPUT_HELP = """Train on a CPU, kill all ranks every so often, start them again; account for
the time.

\b
Examples (10 minutes; 3 minutes):
  python -m ghostvis_mega drill goodput
  python -m ghostvis_mega drill goodput --seconds 180 --kill-every 90 --json

\b
Each launch resumes from the newest checkpoint by itself. The figures are those that a run keeps in
goodput.jsonl and shows in its report; --folder keeps both. Two steps before the clock starts leave
the one-time costs of a machine out: DeepSpeed builds a part of itself on first use, and libraries
come from the disk.
Exit code: 0 all bars are kept, 1 one is missed or a rank failed.
"""

_ENVIRONMENT = {"OMP_NUM_THREADS": "1"} | device_environment("cpu")
_WARM_UP_S = 300.0


def drill_goodput(
    seconds: Annotated[float, typer.Option(min=10, help="Of the whole drill.")] = 600.0,
    kill_every: Annotated[float, typer.Option(min=5, help="Seconds between kills.")] = 60.0,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 2,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 12,
    folder: Annotated[Path | None, typer.Option(help="New folder to keep the run in.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start the ranks again and again."""
    if folder is not None and folder.exists():
        raise typer.BadParameter(f"{folder} exists: name a new folder", param_hint="--folder")
    from ghostvis_mega.perf.goodput_drill import figures_of, prepare

    with tempfile.TemporaryDirectory(prefix="ghostvis-goodput-") as temporary:
        place = folder or Path(temporary)
        config = prepare(place, save_every=save_every)
        _warm_up(config, processes=processes)
        kills = _run(config, seconds=seconds, kill_every=kill_every, processes=processes)
        rows = figures_of(place, kills=kills)
    title = f"{seconds:g} s, killed every {kill_every:g} s"
    conclude(rows, title=title, as_json=as_json)


def _warm_up(config: Path, *, processes: int) -> None:
    """Train two steps apart from the run, before its time counts."""
    apart = [f"log.output={config.with_name('warm-up')}", "train.steps=2"]
    try:
        run_ranks(
            [str(TRAIN_SCRIPT), "--config", str(config), *apart, "checkpoint.save_at_end=false"],
            ranks=processes,
            timeout_s=_WARM_UP_S,
            folder=config.with_name("ranks-warm-up"),
            environment=_ENVIRONMENT,
        )
    except (RankError, RankHang) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _run(config: Path, *, seconds: float, kill_every: float, processes: int) -> int:
    """All launches; returns the number of those that were killed."""
    began, launches = time.monotonic(), 0
    # A launch that is killed while it still imports would leave no trace.
    while (left := seconds - (time.monotonic() - began)) >= kill_every / 2:
        ranks = config.with_name(f"ranks{launches}")
        with started_ranks(
            [str(TRAIN_SCRIPT), "--config", str(config)],
            ranks=processes,
            fuse_s=kill_every + 60,
            folder=ranks,
            environment=_ENVIRONMENT,
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
