"""`ghostvis stress`: hard batches in many layouts, with all ranks' calls compared."""

import json
import os
import sys
import tempfile
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ghostvis_mega.cli.check import DeviceName
from ghostvis_mega.cli.output import AsJson, conclude
from ghostvis_mega.utils.figures import Figure, at_most
from ghostvis_mega.utils.launch import RankError, RankHang, device_environment, run_ranks
from ghostvis_mega.utils.logging import setup_logging

STRESS_HELP = """Train a tiny model on the worst batches in turn and compare what the ranks call.

\b
Examples (the first takes about a minute on two cores):
  python -m ghostvis_mega stress --steps 500
  python -m ghostvis_mega stress --steps 20000
  python -m ghostvis_mega stress --layouts pp2,zero3 --seed 7 --json
  python -m ghostvis_mega stress --device cuda --processes 4 --steps 500
  python -m ghostvis_mega stress --steps 40 --layouts zero1 --fault bucket

\b
Batches: text alone, one picture in all, 40 pictures in a sample, samples as long as a sequence and
longer, damaged pictures and samples, batches in which nothing is trained, losses that are no number
on one rank; answers to held-out questions and checkpoints in between. Ranks that disagree about a
call are named with the first such call. --fault breaks rank 1 on purpose, and must end with 1.
Exit code: 0 fine, 1 a hang, a difference or a broken promise, 2 wrong options.
"""

RESULT = "result.json"
FOLDER_VARIABLE = "GHOSTVIS_STRESS_FOLDER"
_START_UP_S = 300.0
_LAST_CALLS = 3


class FaultName(StrEnum):
    """What may be broken on purpose."""

    skip = "skip"
    bucket = "bucket"
    stall = "stall"


def stress(
    steps: Annotated[int, typer.Option(min=1, help="Over all layouts.")] = 20_000,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 4,
    layouts: Annotated[str, typer.Option(help="Names between commas; all that fit.")] = "",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[DeviceName, typer.Option(help="Where to train.")] = DeviceName.cpu,
    step_timeout_s: Annotated[float, typer.Option(min=1, help="A longer step is a hang.")] = 120.0,
    timeout_s: Annotated[float, typer.Option(min=1, help="For all steps.")] = 7200.0,
    fault: Annotated[FaultName | None, typer.Option(help="Break rank 1 on purpose.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start the ranks, or be one of them."""
    from ghostvis_mega.perf.stress_layouts import StressJob, choose_layouts

    try:
        chosen = choose_layouts(layouts, processes=processes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layouts") from None
    folder = os.environ.get(FOLDER_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="ghostvis-stress-") as temporary:
        job = StressJob(
            folder=Path(folder or temporary),
            layouts=chosen,
            steps=steps,
            seed=seed,
            step_timeout_s=step_timeout_s,
            fault=fault.value if fault is not None else None,
        )
        if folder is not None:
            _be_a_rank(job, device=device.value)
            return
        rows = _start(job, processes=processes, device=device.value, timeout_s=timeout_s)
    conclude(rows, title=f"{steps} hard steps on {processes} ranks", as_json=as_json)


def _be_a_rank(job: Any, *, device: str) -> None:
    setup_logging(rank=int(os.environ["RANK"]))
    import torch

    from ghostvis_mega.checkpoint.store import CheckpointStore
    from ghostvis_mega.engine.step import TrainEngine
    from ghostvis_mega.perf.stress import rows_of, settings_of, stress
    from ghostvis_mega.session import local_device, open_world

    def save(engine: TrainEngine, folder: Path, done: int) -> None:
        with closing(CheckpointStore(folder, keep=1)) as store:
            store.save(engine, step=done, extra={})

    torch.set_num_threads(1)
    first = settings_of(job.layouts[0], job, steps=1, cuda=device == "cuda")
    with open_world(first, device=local_device(first)) as world:
        outcomes = stress(
            job,
            device=world.device,
            watchdog=world.watchdog,
            save=save,
        )
        if world.groups.rank == 0:
            rows = rows_of(outcomes, steps=job.steps)
            (job.folder / RESULT).write_text(json.dumps(rows))


def _start(job: Any, *, processes: int, device: str, timeout_s: float) -> list[Figure]:
    """Write the data, run this command on all ranks, and say what became of them."""
    from ghostvis_mega.perf.stress_data import write_datasets
    from ghostvis_mega.perf.stress_layouts import write_deepspeed_files

    write_datasets(job.folder / "data")
    write_deepspeed_files(job)
    own = {FOLDER_VARIABLE: str(job.folder), "OMP_NUM_THREADS": "1"}
    try:
        run_ranks(
            ["-m", "ghostvis_mega", *sys.argv[1:]],
            ranks=processes,
            timeout_s=timeout_s + _START_UP_S,
            folder=job.folder / "ranks",
            environment=own | device_environment(device),
            first_output=2,
        )
    except (RankError, RankHang) as failure:
        return _rows_of_a_failure(job, processes=processes, failure=failure)
    return [*_ending_rows(None, None), *json.loads((job.folder / RESULT).read_text())]


def _rows_of_a_failure(job: Any, *, processes: int, failure: RankError | RankHang) -> list[Figure]:
    """What the ranks have left behind says who differs, whether they hang, fail or are killed."""
    from ghostvis_mega.parallel.trace_compare import first_difference, read_record

    typer.echo(str(failure), err=True)
    paths = [job.folder / f"trace{rank}.jsonl" for rank in range(processes)]
    found = {rank: read_record(p, rank=rank) for rank, p in enumerate(paths) if p.is_file()}
    records = [record for record in found.values() if record is not None]
    difference = first_difference(records)
    for rank in sorted(set(range(processes)) - {record.rank for record in records}):
        typer.echo(f"rank {rank} left no calls: it ended before it could note any", err=True)
    for record in records:
        typer.echo(f"last calls of rank {record.rank}:", err=True)
        for call in record.calls[-_LAST_CALLS:]:
            typer.echo(f"  {call} in group {record.groups[call.group]}", err=True)
    return _ending_rows(failure, difference)


def _ending_rows(failure: RankError | RankHang | None, difference: str | None) -> list[Figure]:
    """How the job ended, in the same rows for good and bad ends.

    A job that ends without failure has no difference: every comparison that found one ends it.
    """
    hung = isinstance(failure, RankHang) or isinstance(failure, RankError) and failure.hung
    found = {
        "hangs": hung,
        "other failures of ranks": failure is not None and not hung,
        "differences between ranks' calls": difference is not None,
    }
    rows = [at_most(name, int(bad), "", 0) for name, bad in found.items()]
    if difference is not None:
        rows.append(at_most(difference, 1, "", 0))
    return rows
