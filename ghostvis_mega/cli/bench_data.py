"""`ghostvis bench data`: how fast planning, loading, opening and ingesting are."""

from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.logging import setup_logging

BENCH_DATA_HELP = """Time planning, loading, opening and ingesting on synthetic data of real sizes.

\b
Examples (about two minutes, some 300 MB of temporary files, both cores of two):
  python -m ghostvis_mega bench data
  python -m ghostvis_mega bench data --json --folder /fast/disk
  python -m ghostvis_mega bench data --no-energon
  python -m ghostvis_mega bench data --energon other/bin/python

\b
Rows without a bar are shown for comparison: Pillow alone, and energon, decode the same pictures.
The first run installs megatron-energon with pip into an environment of its own (110 MB under
$XDG_CACHE_HOME/ghostvis or ~/.cache/ghostvis) that uses the packages at hand; later runs reuse it.
Exit code: 0 fine, 1 a bar is missed or energon is "not measured", 2 wrong options.
"""


def bench_data(
    folder: Annotated[Path | None, typer.Option(help="Where to write temporary files.")] = None,
    energon: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="Python that has megatron-energon; none is installed."),
    ] = None,
    no_energon: Annotated[
        bool, typer.Option("--no-energon", help="Leave energon out; install nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print figures of the data path."""
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a directory", param_hint="--folder")
    if no_energon and energon is not None:
        raise typer.BadParameter("not together with --energon", param_hint="--no-energon")
    setup_logging(rank=0)
    from ghostvis_mega.perf.bench_data import measure_data
    from ghostvis_mega.perf.bench_energon import find_energon

    try:
        rows = measure_data(folder, energon=None if no_energon else find_energon(energon))
    except GhostVisError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    conclude(rows, title="data path", as_json=as_json)
