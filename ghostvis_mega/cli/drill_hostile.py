"""`ghostvis drill hostile`: files made to do harm, at every door."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude
from ghostvis_mega.utils.figures import Figure, at_least, at_most, measured

DRILL_HOSTILE_HELP = """Bring hostile files to every place that reads files from outside.

\b
Examples (CPU, half a minute):
  python -m ghostvis_mega drill hostile
  python -m ghostvis_mega drill hostile --json

\b
Each file has to be refused with a sentence, with nothing run, fetched or written, in at most
2 s of CPU time and 256 MiB. Exit code: 0 all were, 1 otherwise.
"""

ENOUGH = 60


def drill_hostile(
    folder: Annotated[
        Path | None, typer.Option(help="Keep the files in this new folder.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the files, try them, judge."""
    from ghostvis_mega.cli.hostile.drill import run_drill

    with tempfile.TemporaryDirectory(prefix="ghostvis-hostile-") as temporary:
        rows: list[Figure] = []
        results = list(run_drill(folder or Path(temporary)))
    for result in results:
        if result.problem is not None:
            rows.append(measured(result.case.name, result.problem, ok=False))
    refused = sum(result.problem is None for result in results)
    outcomes = [result.outcome for result in results]
    rows += [
        at_least("hostile files", len(results), "", ENOUGH),
        at_least("refused with a sentence", refused, "", len(results)),
        at_most("longest refusal", max(o.cpu_s for o in outcomes), "s CPU", 2.0),
        at_most("most memory", max(o.memory_mib for o in outcomes), "MiB", 256.0),
    ]
    conclude(rows, title="hostile files", as_json=as_json)
