"""What commands share: exit codes and tables."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.figures import Figure, any_missed

EXIT_WRONG_SETTINGS = 2
AsJson = Annotated[bool, typer.Option("--json", help="Print rows as JSON.")]


def print_rows(rows: Sequence[Figure], *, title: str, as_json: bool) -> None:
    """Print rows of name, value, unit, bar and ok as a table or as one JSON list."""
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(title=title)
    for name in ("name", "value", "unit", "bar", "ok"):
        side = "right" if name == "value" else "left"
        # The end of a long name is what tells it from its neighbours.
        table.add_column(name, justify=side, overflow="fold")
    for row in rows:
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
        value = "not measured" if row["value"] is None else value
        verdict = {True: "yes", False: "NO", None: ""}[row["ok"]]
        bar = "" if row["bar"] is None else f"{row['bar']:g}"
        table.add_row(row["name"], value, row["unit"], bar, verdict)
    Console().print(table)


@contextmanager
def refusing_settings() -> Iterator[None]:
    """End with `EXIT_WRONG_SETTINGS` and all problems where the settings read inside are wrong."""
    try:
        yield
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None


@contextmanager
def scratch(kind: str, under: Path | None) -> Iterator[Path]:
    """A folder that is deleted at the end, in `under` (made if it is not there) or the system's."""
    if under is not None:
        under.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"ghostvis-{kind}-", dir=under) as folder:
        yield Path(folder)


def conclude(
    rows: Sequence[Figure], *, title: str, as_json: bool = False, show: bool = True
) -> None:
    """Print rows, and end with 1 if one of them misses its bar; all ranks but one do not `show`."""
    if show:
        print_rows(rows, title=title, as_json=as_json)
    if any_missed(rows):
        raise typer.Exit(1)
