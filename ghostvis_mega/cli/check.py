"""`ghostvis check`: settings against all rules, and the plan they make."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS
from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.config.load import read_run_config
from ghostvis_mega.config.rules import Device
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.config.sizes import checkpoint_bytes, parameter_counts
from ghostvis_mega.data.manifest import read_manifest
from ghostvis_mega.engine.memory import (
    MODES,
    most_pictures,
    predict,
    rows_at_a_time,
    unpredictable,
)
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.secrets import hide


class DeviceName(StrEnum):
    """Where a run would run."""

    cpu = "cpu"
    cuda = "cuda"


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


def check(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change: section.key=value ...", show_default=False),
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    device: Annotated[
        DeviceName | None,
        typer.Option(
            help="Where it would run; by default on GPUs if the run asks for them, else here.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    try:
        place = _place(config, overrides or []) if device is None else device.value
        run = load_checked(config, overrides or [], world_size=world_size, device=place)
    except ConfigError as error:
        if as_json:
            problems = [hide(problem) for problem in error.problems]
            typer.echo(json.dumps({"ok": False, "problems": problems}, indent=2))
        else:
            typer.echo(hide(str(error)), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    plan = _plan(run, world_size=world_size)
    if as_json:
        typer.echo(json.dumps({"ok": True, "problems": [], **plan}, indent=2))
    else:
        _show(run, plan)


def _place(config: Path, overrides: list[str]) -> Device | None:
    """GPUs for a run that needs them, wherever it is checked; else None, as a run decides it."""
    given = read_run_config(config, overrides).config
    needed = given is not None and (given.train.device == "cuda" or given.train.fp8 != "none")
    return "cuda" if needed else None


def _plan(run: RunConfig, *, world_size: int) -> dict[str, Any]:
    """What the run resolves to, as plain values."""
    degrees = Degrees.of(run, world_size=world_size)
    engines = {
        engine: deepspeed.resolve_deepspeed(path, run=run, engine=engine, world_size=world_size)
        for engine, path in deepspeed.engine_files(run).items()
    }
    stages: dict[str, int] = {engine: resolved.stage for engine, resolved in engines.items()}
    return {
        "layout": {
            "world_size": world_size,
            "tensor": degrees.tensor,
            "pipeline": degrees.pipeline,
            "virtual_pipeline": degrees.virtual_pipeline,
            "context": degrees.context,
            "data": degrees.data,
            "sequence_parallel": run.parallel.sequence_parallel and degrees.tensor > 1,
            "layers_per_stage": list(degrees.layers_per_stage(run)),
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
        "host_bytes": {
            engine: _host_bytes(run, engine=engine, stage=resolved.stage, world_size=world_size)
            for engine, resolved in engines.items()
            if resolved.offload
        },
        "checkpoint_bytes": checkpoint_bytes(run),
        "gpu_memory": _gpu_memory(run, world_size=world_size),
        "precision": run.train.precision,
        "steps": run.train.steps,
        "output": str(run.log.output),
        "notes": rules.find_notes(run, world_size=world_size),
    }


def _gpu_memory(run: RunConfig, *, world_size: int) -> dict[str, Any] | None:
    """What a GPU would need in each mode of activation checkpointing; None where nobody can tell,
    or on CPUs."""
    if run.train.device == "cpu" or unpredictable(run, world_size=world_size):
        return None
    pictures = _usual_pictures(run, world_size=world_size)
    modes = {}
    for mode in MODES:
        need = predict(run, mode, world_size=world_size, pictures=pictures)
        modes[mode] = asdict(need) | {"total": need.total}
    return {"pictures": pictures, "bytes": modes}


def _usual_pictures(run: RunConfig, *, world_size: int) -> int:
    """About how many a rank encodes at a time: the share of them in all of data.train."""
    counts = read_manifest(run.data.train).counts
    positions = counts.tokens + counts.images * (run.model.tokens_per_image - 1)
    together = rows_at_a_time(run, world_size=world_size) * run.data.seq_length
    usual = -(-counts.images * together // (positions * world_size)) if positions else 0
    return min(usual, most_pictures(run, world_size=world_size))


def _host_bytes(run: RunConfig, *, engine: str, stage: int, world_size: int) -> int:
    """About what an offloaded optimizer takes of one process's host memory."""
    counts = parameter_counts(run.model)
    own = [name for name in run.trained_modules if (name == "llm") == (engine == "llm")]
    # Master, two moments and gradient; then what DeepSpeed stages: weights on their way to the
    # device, or with stage 3 gradients on their way from it.
    staged = 2 if stage < 3 and run.train.precision == "bf16" else 4
    return -(-sum(counts[name] for name in own) * (16 + staged) // world_size)


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
    table.add_row("  layers", _layers_line(layout))
    table.add_row("  sequence parallel", "yes" if layout["sequence_parallel"] else "no")
    per_step = f"{batch['global_size']} sequences of {batch['seq_length']} positions"
    table.add_row("batch", f"{per_step} = {batch['positions_per_step']:,} a step")
    micro = f"{batch['micro_batches']} micro-batches of {batch['micro_size']}"
    table.add_row("  each replica", micro)
    for engine, stage in plan["zero_stages"].items():
        host = plan["host_bytes"].get(engine)
        place = f", optimizer on the host: {host / 2**30:,.2f} GiB a process" if host else ""
        table.add_row(f"ZeRO, {engine} engine", f"stage {stage}{place}")
    table.add_row("precision", plan["precision"])
    table.add_row("steps", f"{plan['steps']:,}")
    size, keep = plan["checkpoint_bytes"] / 1e9, run.checkpoint.keep
    room = f"{size:,.3g} GB each, {size * (keep + 1):,.3g} GB for {keep} and the one being written"
    table.add_row("checkpoints", room)
    if plan["gpu_memory"] is not None:
        _add_memory(table, plan["gpu_memory"], chosen=run.train.recompute)
    table.add_row("output", str(run.log.output))
    console.print(table)
    for note in plan["notes"]:
        console.print(f"Note: {note}", markup=False)
    console.print("No problems found.")


def _add_memory(table: Table, memory: dict[str, Any], *, chosen: str) -> None:
    """A line for each mode of activation checkpointing, parts for the one that is set."""
    pictures = memory["pictures"]
    shown = f", with {pictures} pictures encoded at a time" if pictures else ""
    words = "the first of these that fits" if chosen == "auto" else chosen
    table.add_row("memory of a GPU", f"about, train.recompute: {words}{shown}")
    for mode, parts in memory["bytes"].items():
        line = f"{parts['total'] / 2**30:,.1f} GiB"
        if mode == chosen:
            held = {name: size for name, size in parts.items() if size and name != "total"}
            told = " + ".join(f"{name} {size / 2**30:,.1f}" for name, size in held.items())
            line += f" = {told}"
        table.add_row(f"  {mode}", line)


def _layers_line(layout: dict[str, Any]) -> str:
    sizes = layout["layers_per_stage"]
    if len(sizes) == 1:
        return str(sizes[0])
    line = f"{' + '.join(map(str, sizes))} on the stages"
    if len(set(sizes)) == 1:
        line = f"{sizes[0]} on each stage"
    chunks = layout["virtual_pipeline"]
    return f"{line}, each in {chunks} chunks" if chunks > 1 else line


def _model_line(run: RunConfig) -> str:
    total = sum(parameter_counts(run.model).values())
    line = f"{run.model.preset or 'own sizes'}, {total / 1e6:,.1f} M parameters"
    if run.model.tokens_per_image:
        line += f", {run.model.tokens_per_image} embeddings an image"
    return line
