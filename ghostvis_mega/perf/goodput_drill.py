"""A run that is killed again and again, and what was left of its time."""

from pathlib import Path
from typing import Any

import yaml

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.stress_data import write_datasets
from ghostvis_mega.perf.stress_layouts import LAYOUTS, StressJob, settings_of, write_deepspeed_files
from ghostvis_mega.train.goodput import LEDGER, PARTS, read_account, read_rows
from ghostvis_mega.utils.figures import Figure, at_least, at_most, measured

GOODPUT = 0.8
START_UP_S = 15.0
_ENDLESS = 1_000_000
"""Steps that no drill comes to the end of."""


def drill_job(folder: Path) -> StressJob:
    """The model and the data of the drill, in a folder that has them or will."""
    return StressJob(folder, LAYOUTS[:1], steps=_ENDLESS, seed=0, step_timeout_s=300)


def prepare(folder: Path, *, save_every: int) -> Path:
    """Write data and settings of a drill into a new folder; returns the run's YAML file."""
    job = drill_job(folder)
    write_datasets(folder / "data")
    write_deepspeed_files(job)
    file = folder / "run.yaml"
    settings = drill_run(folder, save_every=save_every).model_dump(mode="json")
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def drill_run(folder: Path, *, save_every: int) -> RunConfig:
    """Settings of the run: no previews, a checkpoint every `save_every` steps."""
    run = settings_of(LAYOUTS[0], drill_job(folder), steps=_ENDLESS, cuda=False)
    # Of a smaller run's few milliseconds a step, what lies between steps would be a share that no
    # real run knows.
    llm = run.model.llm.model_copy(update={"num_layers": 12})
    batch = run.batch.model_copy(update={"global_size": 2 * run.batch.global_size})
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"llm": llm}),
            "batch": batch,
            "log": run.log.model_copy(
                update={"output": folder / "run", "preview_steps": (), "every": 1000}
            ),
            "checkpoint": run.checkpoint.model_copy(update={"save_every": save_every, "keep": 2}),
            "data": run.data.model_copy(update={"num_workers": 1}),
        }
    )


def figures_of(folder: Path, *, kills: int) -> list[Figure]:
    """What the ledger says of a drill.

    Args:
        folder: Of the drill.
        kills: How often all ranks were killed.
    """
    path = folder / "run" / LEDGER
    account = read_account(path)
    starts = start_ups(read_rows(path))
    slowest = "slowest start of a process to its first step"
    rows: list[Figure] = [
        at_least("goodput", account.share, "of wall time", GOODPUT),
        at_most(slowest, max(starts), "s", START_UP_S)
        if starts
        else measured(slowest, None, "s", bar=START_UP_S, ok=False),
        # Killed before it came so far, a launch has no time that could be too long.
        at_most("launches without a step", account.launches - len(starts), "", 0),
        measured("wall time", account.wall_s, "s"),
        measured("kills", kills, ""),
        at_least("launches", account.launches, "", kills),
    ]
    rows += [measured(part, account.seconds[part], "s") for part in PARTS]
    # Every second must be in one part: the account may not flatter by forgetting some.
    missing = abs(account.wall_s - sum(account.seconds.values()))
    return [*rows, at_most("seconds in no part, or in two", missing, "s", 0.01)]


def start_ups(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds from each process's start to the end of its first step."""
    found, started = [], None
    for row in rows:
        if row["kind"] == "launch":
            started = row["time"]
        elif row["kind"] == "time" and started is not None and row["last"] >= row["first"]:
            found.append(row["time"] - started)
            started = None
    return found
