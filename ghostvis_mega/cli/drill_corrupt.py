"""`ghostvis drill corrupt`: damaged checkpoints, all of which must be noticed."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude
from ghostvis_mega.utils.figures import at_least, at_most, measured
from ghostvis_mega.utils.logging import setup_logging

DRILL_CORRUPT_HELP = """Damage checkpoints in every way; all damage must be found, its file named.

\b
Examples (some seconds; --unverified compares sizes alone, and must end with 1):
  python -m ghostvis_mega drill corrupt
  python -m ghostvis_mega drill corrupt --trials 20000 --seed 7 --json
  python -m ghostvis_mega drill corrupt --unverified

\b
Bits are flipped, files cut short, grown, zeroed, deleted, swapped and taken from another
checkpoint, in every kind of file. A run that resumes by itself must then begin with the checkpoint
before.
Exit code: 0 everything was found, 1 otherwise.
"""


def drill_corrupt(
    trials: Annotated[int, typer.Option(min=1, help="Damaged checkpoints.")] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    unverified: Annotated[bool, typer.Option("--unverified", help="Do not read digests.")] = False,
    as_json: AsJson = False,
) -> None:
    """All trials, one after the other."""
    setup_logging(rank=0)
    from ghostvis_mega.checkpoint.drill_corrupt import corrupt

    with tempfile.TemporaryDirectory(prefix="ghostvis-drill-") as folder:
        findings = corrupt(Path(folder), trials=trials, seed=seed, verify=not unverified)
    for problem in findings.problems[:20]:
        typer.echo(problem, err=True)
    rows = [measured(kind, count, "trials") for kind, count in findings.trials.items()]
    total = sum(findings.trials.values())
    rows += [
        at_least("damaged checkpoints", total, "trials", trials),
        at_most("unnoticed, or not named, or no fallback", len(findings.problems), "trials", 0),
    ]
    conclude(rows, title="corruption drill", as_json=as_json)
