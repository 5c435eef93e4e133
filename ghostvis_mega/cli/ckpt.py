"""`ghostvis ckpt`: look at checkpoints, verify them, cut them anew, delete old ones."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.figures import at_most, measured
from ghostvis_mega.utils.logging import setup_logging

ckpt_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, verify, reshard and prune checkpoints."
)

LIST_HELP = """Show the checkpoints of a run.

\b
Example:
  python -m ghostvis_mega ckpt list runs/demo/checkpoints
"""
VERIFY_HELP = """Read checkpoints whole and compare every file with its digest.

\b
Examples (a checkpoint, or all of a run):
  python -m ghostvis_mega ckpt verify runs/demo/checkpoints/step-00001800
  python -m ghostvis_mega ckpt verify runs/demo/checkpoints --json

\b
Exit code: 0 all are sound, 1 damage, 2 there is none.
"""
RESHARD_HELP = """Cut a checkpoint anew for another layout, without a GPU or a process group.

\b
Example (a run resumes from any layout without this as well):
  python -m ghostvis_mega ckpt reshard runs/demo/checkpoints/step-00001800 one --world 1
  python -m ghostvis_mega ckpt reshard one two --world 2 --tensor 2

\b
Weights, masters, moments, counts and FP8 scales are the same bits. Random generators are left out:
nothing in training draws from them. One that is killed leaves OUTPUT.tmp-..., which you may delete.
"""
PRUNE_HELP = """Delete all but the newest complete checkpoints that verify.

\b
Example:
  python -m ghostvis_mega ckpt prune runs/demo/checkpoints --keep 2

\b
They are read whole, newest first, until enough are found that are sound. Damaged ones among them do
not count, and stay for you to look at; what is older is deleted unread. Incomplete ones stay.
"""

Folder = Annotated[Path, typer.Argument(help="OUTPUT/checkpoints of a run.", show_default=False)]


def _refuse(error: GhostVisError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(EXIT_WRONG_SETTINGS)


@ckpt_app.command("list", help=LIST_HELP)
def list_(folder: Folder, as_json: AsJson = False) -> None:
    """One row a checkpoint."""
    setup_logging(rank=0)
    rows = [_about(path) for path in _checkpoints(folder)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("checkpoint", "step", "sequences", "GB", "layout", "state")
    for row in rows:
        table.add_row(*(str(row[key]) for key in row))
    Console().print(table)


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run's folder, or the one that is named."""
    from ghostvis_mega.checkpoint.folder import CheckpointFolder
    from ghostvis_mega.checkpoint.manifest import MANIFEST_FILE

    if (path / MANIFEST_FILE).is_file():
        return [path]
    found = CheckpointFolder(path).candidates()
    if not found:
        typer.echo(f"error: {path} holds no checkpoint", err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS)
    return found


def _about(path: Path) -> dict[str, Any]:
    from ghostvis_mega.checkpoint.folder import open_complete

    row = {"checkpoint": path.name, "step": "", "sequences": "", "GB": "", "layout": ""}
    try:
        manifest = open_complete(path).manifest
    except GhostVisError as error:
        return row | {"state": str(error)}
    size = sum(info.bytes for info in manifest.files.values())
    names = {"world_size": "", "parallel.tensor": "TP ", "parallel.pipeline": "PP "}
    cut = [f"{text}{manifest.layout[key]}" for key, text in names.items() if key in manifest.layout]
    return row | {
        "step": manifest.step,
        "sequences": manifest.sequences,
        "GB": round(size / 1e9, 3),
        "layout": ", ".join(cut) or "weights alone",
        "state": "complete",
    }


@ckpt_app.command("verify", help=VERIFY_HELP)
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of them.")],
    as_json: AsJson = False,
) -> None:
    """Digests of every file."""
    setup_logging(rank=0)
    from ghostvis_mega.checkpoint.reader import whole_damage

    rows, problems = [], []
    for checkpoint in _checkpoints(path):
        damage = whole_damage(checkpoint)
        problems += damage
        rows.append(at_most(f"damaged files in {checkpoint.name}", len(damage), "files", 0))
    for problem in problems:
        typer.echo(problem, err=True)
    conclude(rows, title=f"verify {path}", as_json=as_json)


@ckpt_app.command("reshard", help=RESHARD_HELP)
def reshard(
    source: Annotated[Path, typer.Argument(help="A checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="New directory.", show_default=False)],
    world: Annotated[int, typer.Option(min=1, help="Processes of the run that will read it.")],
    tensor: Annotated[int, typer.Option(min=1)] = 1,
    pipeline: Annotated[int, typer.Option(min=1)] = 1,
    virtual_pipeline: Annotated[int, typer.Option(min=1)] = 1,
    context: Annotated[int, typer.Option(min=1)] = 1,
    first_stage_layers: Annotated[int | None, typer.Option(min=1)] = None,
    last_stage_layers: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """The same numbers in other files."""
    setup_logging(rank=0)
    from ghostvis_mega.checkpoint.rewrite import Target
    from ghostvis_mega.checkpoint.rewrite import reshard as rewrite
    from ghostvis_mega.config.schema import ParallelConfig

    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        context=context,
        first_stage_layers=first_stage_layers,
        last_stage_layers=last_stage_layers,
    )
    try:
        rewrite(source, output, Target(parallel=parallel, world_size=world))
    except GhostVisError as error:
        raise _refuse(error) from None
    typer.echo(f"wrote {output}")


@ckpt_app.command("prune", help=PRUNE_HELP)
def prune(
    folder: Folder,
    keep: Annotated[int, typer.Option(min=1, help="Complete checkpoints that stay.")],
    as_json: AsJson = False,
) -> None:
    """Retention by hand."""
    setup_logging(rank=0)
    from ghostvis_mega.checkpoint.folder import CheckpointFolder
    from ghostvis_mega.checkpoint.reader import whole_damage

    _checkpoints(folder)
    checkpoints, sound = CheckpointFolder(folder), 0
    for found in reversed(checkpoints.complete()):
        if sound == keep:
            break
        if damage := whole_damage(found.path):
            typer.echo("; ".join(damage), err=True)
            checkpoints.damaged.add(found.path.name)
        else:
            sound += 1
    deleted = checkpoints.prune(keep) if sound == keep else []
    rows = [measured(f"deleted {path.name}", 1) for path in deleted]
    rows.append(measured("sound checkpoints", sound, "kept" if sound >= keep else "found"))
    conclude(rows, title=f"prune {folder}", as_json=as_json)
