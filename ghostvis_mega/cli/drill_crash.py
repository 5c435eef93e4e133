"""`ghostvis drill crash`: saves that are killed anywhere, and what a restarted run finds."""

import logging
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude
from ghostvis_mega.utils.figures import at_least, at_most, measured
from ghostvis_mega.utils.logging import setup_logging

DRILL_CRASH_HELP = """Kill saves at every point and at random times; nothing may be lost.

\b
Examples (two to three minutes on two idle cores, or a quarter with fewer kills):
  python -m ghostvis_mega drill crash
  python -m ghostvis_mega drill crash --random-kills 40 --json
  python -m ghostvis_mega drill crash --random-kills 0 --fault prune-first

\b
Every write, fsync, rename and deletion of a save is a point: one and two ranks are killed there
with SIGKILL, alone or together, or find the disk full. At each point of one rank's save a power cut
is played as well: data that was not brought to the disk is gone, and so are names. After each, the
newest complete checkpoint must be the state of its step and at most one save old, and the next save
must succeed.
--fault breaks the saving on purpose, and must end with 1.
Exit code: 0 nothing is lost, 1 otherwise.
"""


class FaultName(StrEnum):
    """What may be broken on purpose."""

    prune_first = "prune-first"
    manifest_first = "manifest-first"
    no_fsync = "no-fsync"


def drill_crash(
    random_kills: Annotated[int, typer.Option(min=0, help="Beside the named points.")] = 400,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    fault: Annotated[FaultName | None, typer.Option(help="Break it on purpose.")] = None,
    as_json: AsJson = False,
) -> None:
    """All trials, one after the other."""
    setup_logging(rank=0)
    # What is found damaged here is damaged on purpose.
    logging.getLogger("ghostvis_mega").setLevel(logging.ERROR)
    import torch

    from ghostvis_mega.checkpoint.drill_crash import CrashDrill, Findings

    torch.set_num_threads(1)
    name = None if fault is None else fault.value
    found = {
        "kills at points": Findings(),
        "power cuts": Findings(),
        "full disks": Findings(),
        "random kills": Findings(),
    }
    with tempfile.TemporaryDirectory(prefix="ghostvis-drill-") as folder:
        for ranks in (1, 2) if fault is None else (1,):
            work = Path(folder) / str(ranks)
            work.mkdir()
            drill = CrashDrill(work, ranks=ranks, fault=name)
            drill.every_point(found["kills at points"])
            if ranks == 1:
                drill.power_cuts(found["power cuts"])
            if fault is None:
                drill.full_disks(found["full disks"])
            share = random_kills - random_kills // 4 if ranks == 1 else random_kills // 4
            drill.random_times(found["random kills"], kills=share, seed=seed + ranks)
    problems = [problem for findings in found.values() for problem in findings.problems]
    for problem in problems[:20]:
        typer.echo(problem, err=True)
    bar = None if fault is not None else 40
    rows = [at_least("named points", len(found["kills at points"].points), "points", bar)]
    rows += [measured(kind, findings.trials, "trials") for kind, findings in found.items()]
    rows += [
        at_most(f"losses after {kind}", len(findings.problems), "", 0)
        for kind, findings in found.items()
    ]
    conclude(rows, title="crash drill", as_json=as_json)
