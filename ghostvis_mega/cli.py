"""The command line. Commands import what they need when they run, so that `check` stays quick."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.config.sizes import parameter_counts
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import ConfigError, GhostVisError
from ghostvis_mega.utils.logging import setup_logging

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="GhostVis-Mega: train vision-language models with Megatron-Core and DeepSpeed.",
)

EXIT_WRONG_SETTINGS = 2


class DeviceName(StrEnum):
    """Where a run would run."""

    cpu = "cpu"
    cuda = "cuda"


@app.callback()
def _commands() -> None:
    """Keep `check` a command of its own while it is the only one."""


CHECK_HELP = """Check a run's settings and print its plan; nothing is started.

\b
Examples:
  python -m ghostvis_mega check examples/configs/vlm_tiny_easyvqa.yaml --world-size 2
  python -m ghostvis_mega check examples/configs/vlm_7b_sft.yaml --world-size 64 --device cuda
  python -m ghostvis_mega check run.yaml parallel.tensor=2 optim.lr.llm=2e-5 --json

\b
Paths inside the file are relative to the working directory.
Exit code: 0 fine, 2 problems (all of them are listed).
"""


@app.command(help=CHECK_HELP)
def check(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change: section.key=value ...", show_default=False),
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    device: Annotated[DeviceName, typer.Option(help="Where it would run.")] = DeviceName.cpu,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    try:
        run = load_checked(config, overrides or [], world_size=world_size, device=device.value)
    except ConfigError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "problems": error.problems}, indent=2))
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    plan = _plan(run, world_size=world_size)
    if as_json:
        typer.echo(json.dumps({"ok": True, "problems": [], **plan}, indent=2))
    else:
        _show(run, plan)


def _plan(run: RunConfig, *, world_size: int) -> dict[str, Any]:
    """What the run resolves to, as plain values."""
    degrees = Degrees.of(run, world_size=world_size)
    stages: dict[str, int] = {
        engine: deepspeed.resolve_deepspeed(
            path, run=run, engine=engine, world_size=world_size
        ).stage
        for engine, path in deepspeed.engine_files(run).items()
    }
    return {
        "layout": {
            "world_size": world_size,
            "tensor": degrees.tensor,
            "pipeline": degrees.pipeline,
            "virtual_pipeline": degrees.virtual_pipeline,
            "data": degrees.data,
            "sequence_parallel": run.parallel.sequence_parallel and degrees.tensor > 1,
            "layers_per_chunk": degrees.layers_per_chunk(run),
            "summary": degrees.describe(),
        },
        "batch": {
            "global_size": run.batch.global_size,
            "micro_size": run.batch.micro_size,
            "micro_batches": degrees.num_micro_batches(run),
            "seq_length": run.data.seq_length,
            "positions_per_step": run.batch.global_size * run.data.seq_length,
        },
        "parameters": dict(parameter_counts(run.model)),
        "trained": list(run.trained_modules),
        "learning_rates": {name: getattr(run.optim.lr, name) for name in run.trained_modules},
        "tokens_per_image": run.model.tokens_per_image,
        "zero_stages": stages,
        "precision": run.train.precision,
        "steps": run.train.steps,
        "notes": rules.find_notes(run, world_size=world_size, stages=stages),
    }


def _show(run: RunConfig, plan: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    layout, batch = plan["layout"], plan["batch"]
    table.add_row("model", _model_line(run))
    for name, count in plan["parameters"].items():
        trained = name in plan["trained"]
        state = f"trained, lr {plan['learning_rates'][name]:g}" if trained else "frozen"
        table.add_row(f"  {name}", f"{count / 1e6:,.1f} M parameters, {state}")
    table.add_row("layout", layout["summary"])
    table.add_row("  layers", f"{layout['layers_per_chunk']} in each model chunk")
    table.add_row("  sequence parallel", "yes" if layout["sequence_parallel"] else "no")
    per_step = f"{batch['global_size']} sequences of {batch['seq_length']} positions"
    table.add_row("batch", f"{per_step} = {batch['positions_per_step']:,} a step")
    micro = f"{batch['micro_batches']} micro-batches of {batch['micro_size']}"
    table.add_row("  each replica", micro)
    for engine, stage in plan["zero_stages"].items():
        table.add_row(f"ZeRO, {engine} engine", f"stage {stage}")
    table.add_row("precision", plan["precision"])
    table.add_row("steps", f"{plan['steps']:,}")
    table.add_row("output", str(run.log.output))
    console.print(table)
    for note in plan["notes"]:
        console.print(f"Note: {note}", markup=False)
    console.print("No problems found.")


def _model_line(run: RunConfig) -> str:
    total = sum(parameter_counts(run.model).values())
    line = f"{run.model.preset or 'own sizes'}, {total / 1e6:,.1f} M parameters"
    if run.model.tokens_per_image:
        line += f", {run.model.tokens_per_image} embeddings an image"
    return line


GRADIENTS_HELP = """Compare first-step gradients of layouts with those of one plain fp32 process.

\b
Examples (the first writes the truth on one device, the second compares two layouts with it):
  python -m ghostvis_mega gradients RUN.yaml --write-truth truth.safetensors
  torchrun --nproc-per-node 4 -m ghostvis_mega gradients RUN.yaml --truth truth.safetensors \\
    --layout parallel.tensor=2 --layout "parallel.tensor=2 parallel.pipeline=2"

\b
The distance of a one-GPU BF16 run is BF16's own rounding noise; a right layout has about the same.
Exit code: 0 fine, 1 a joint error is above --bar, 2 wrong settings.
"""


@app.command(help=GRADIENTS_HELP)
def gradients(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    write_truth: Annotated[Path | None, typer.Option(help="Write the truth to this file.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Compare with the truth in this file.")] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="Overrides of one layout, between blanks; repeatable.")
    ] = None,
    bar: Annotated[float | None, typer.Option(help="Largest joint error that is fine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Write or compare first-step gradients."""
    if (write_truth is None) == (truth is None):
        raise typer.BadParameter("give one of --write-truth FILE and --truth FILE")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if truth is not None and not truth.is_file():
        raise typer.BadParameter(f"{truth} is not a file: write it with --write-truth first")
    if write_truth is not None and world_size > 1:
        raise typer.BadParameter("--write-truth runs in one process")
    setup_logging(rank=rank)
    try:
        runs = [
            load_checked(config, [*(overrides or []), *text.split()], world_size=world_size)
            for text in layout or [""]
        ]
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    from ghostvis_mega.perf.gradients import compare_layouts, write_true_gradients
    from ghostvis_mega.session import local_device, open_world

    with open_world(runs[0], device=local_device(runs[0])) as world:
        if write_truth is not None:
            write_true_gradients(runs[0], world.groups, write_truth, device=world.device)
            return
        assert truth is not None
        rows = compare_layouts(
            runs, truth, device=world.device, bar=bar, progress=world.watchdog.alive
        )
    if rank == 0:
        print_rows(rows, title=f"gradients against {truth}", as_json=as_json)
    if any(row["ok"] is False for row in rows):
        raise typer.Exit(1)


bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Time parts of the system against bars."
)
app.add_typer(bench_app, name="bench")

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


@bench_app.command("data", help=BENCH_DATA_HELP)
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


def print_rows(rows: list[dict[str, Any]], *, title: str, as_json: bool) -> None:
    """Print rows of name, value, unit, bar and ok as a table or as one JSON list."""
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(title=title)
    for name in ("name", "value", "unit", "bar", "ok"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for row in rows:
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
        verdict = {True: "yes", False: "NO", None: ""}[row["ok"]]
        bar = "" if row["bar"] is None else f"{row['bar']:g}"
        table.add_row(row["name"], value, row["unit"], bar, verdict)
    Console().print(table)


def main() -> None:
    """Entry point of `ghostvis`."""
    app(prog_name="ghostvis")
