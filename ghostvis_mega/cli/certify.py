"""`ghostvis certify`: every layout is the same step, shown on one's own machine."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS
from ghostvis_mega.perf.certify.report import Outcome
from ghostvis_mega.perf.certify.request import Entry, Request
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.logging import setup_logging

CERTIFY_HELP = """Compare layouts with one plain process: gradients, loss, weights after some steps.

\b
Examples:
  python -m ghostvis_mega certify --layouts cpu
  python -m ghostvis_mega certify --layouts cpu --only "PP2.*perceiver" --processes 4
  python -m ghostvis_mega certify --layouts cpu --faults --only "^no sum"
  python -m ghostvis_mega certify --layouts cpu --json > rows.json

\b
The command starts its own processes; under torchrun or deepspeed it joins them.
Exit code: 0 fine, 1 something is over its bar or failed, 2 wrong settings.
"""


def certify(
    layouts: Annotated[str, typer.Option(help="cpu, or a YAML file of layouts.")] = "cpu",
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only names in which this is found.")
    ] = None,
    faults: Annotated[bool, typer.Option(help="Plant faults as well: each must be seen.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each layout.")] = 3,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Most processes to start; layouts of more do not run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Keep the tables (rows.json, table.md) in this folder.")
    ] = None,
    request: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Certify layouts."""
    if request is not None:
        _run_as_rank(Request.read(request))
        return
    setup_logging(rank=int(os.environ.get("RANK", "0")))
    from ghostvis_mega.perf.certify.request import SETS, chosen, entries_of

    try:
        if layouts not in SETS:
            raise ConfigError([f"--layouts {layouts} is no set of layouts. Use cpu."])
        entries = chosen(entries_of(layouts, faults=faults), only)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    with tempfile.TemporaryDirectory(prefix="ghostvis-certify-") as folder:
        wanted = Request(set=layouts, entries=tuple(entries), steps=steps, folder=Path(folder))
        outcomes = _start(wanted, most=processes)
    _report(outcomes, as_json=as_json, output=output)


def _start(request: Request, *, most: int | None) -> list[Outcome]:
    """Launch what fits and list what does not."""
    from ghostvis_mega.perf.certify.drive import certify as drive
    from ghostvis_mega.perf.certify.drive import outcomes_not_run

    fitting = [entry for entry in request.entries if most is None or entry.ranks <= most]
    done: dict[Entry, Outcome] = {}
    if fitting:
        import dataclasses

        ran = drive(
            dataclasses.replace(request, entries=tuple(fitting)),
            device="cpu",
            progress=lambda text: typer.echo(f"certify: {text}", err=True),
        )
        done = dict(zip(fitting, ran, strict=True))
    for entry in request.entries:
        if entry not in done:
            (done[entry],) = outcomes_not_run([entry], f"needs {entry.ranks} processes")
    return [done[entry] for entry in request.entries]


def _report(outcomes: list[Outcome], *, as_json: bool, output: Path | None) -> None:
    from ghostvis_mega.cli.output import print_rows
    from ghostvis_mega.perf.certify.report import exit_code, markdown, show

    rows = [figure for outcome in outcomes for figure in outcome.figures()]
    if as_json:
        print_rows(rows, title="", as_json=True)
    else:
        show(outcomes, title="layouts against one plain process")
    if output is not None:
        import json
        import shlex

        output.mkdir(parents=True, exist_ok=True)
        (output / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
        command = shlex.join(["python", "-m", "ghostvis_mega", *sys.argv[1:]])
        (output / "table.md").write_text(markdown(outcomes, command=command))
    code = exit_code(outcomes)
    if code:
        raise typer.Exit(code)


def _run_as_rank(request: Request) -> None:
    """One rank of a launch that `drive` started."""
    # Libraries print; standard output belongs to the table.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    rank = int(os.environ["RANK"])
    setup_logging(rank=rank)
    from ghostvis_mega.perf.certify.drive import note_error

    try:
        import logging

        import torch

        from ghostvis_mega.perf.certify.ranks import first_run, measure_all
        from ghostvis_mega.session import local_device, open_world

        logging.getLogger("DeepSpeed").setLevel("ERROR")
        torch.set_num_threads(1)
        run = first_run(request)
        with open_world(run, device=local_device(run)) as world:
            measure_all(request, world.groups, device=world.device, progress=world.watchdog.alive)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        note_error(request.folder, rank=rank, text=text)
        raise
