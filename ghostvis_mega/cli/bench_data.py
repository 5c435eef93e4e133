"""`ghostvis bench data`: how fast planning, loading, opening and ingesting are."""

from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, print_rows
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.logging import setup_logging

BENCH_DATA_HELP = """Time planning, loading, opening and ingesting on synthetic data of real sizes.

\b
Examples (about a minute, some 300 MB of temporary files, both cores of two):
  python -m ghostvis_mega bench data
  python -m ghostvis_mega bench data --json --folder /fast/disk
  python -m ghostvis_mega bench data --energon energon/bin/python

\b
Rows without a bar are shown for comparison: Pillow alone, and energon, decode the same pictures.
Exit code: 0 fine, 1 a bar is missed, 2 wrong options, or energon could not be timed.
"""


def bench_data(
    folder: Annotated[Path | None, typer.Option(help="Where to write temporary files.")] = None,
    energon: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="Interpreter that has megatron-energon: time it too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Print figures of the data path."""
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a directory", param_hint="--folder")
    setup_logging(rank=0)
    from ghostvis_mega.perf.bench_data import measure_data
    from ghostvis_mega.perf.bench_energon import INSTALL

    if energon is None:
        typer.echo(f"For energon's figures beside: {INSTALL}", err=True)
    try:
        rows = measure_data(folder, energon=energon)
    except GhostVisError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    print_rows(rows, title="data path", as_json=as_json)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)
