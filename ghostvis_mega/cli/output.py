"""What commands share: exit codes and tables."""

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

EXIT_WRONG_SETTINGS = 2


def print_rows(rows: list[dict[str, Any]], *, title: str, as_json: bool) -> None:
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
