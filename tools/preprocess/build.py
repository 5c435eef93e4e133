"""The command `build`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.build import build, check_build
from ghostvis_mega.data.ingest import DryRun, dry_run
from ghostvis_mega.data.readers.meter import Meters
from ghostvis_mega.data.readers.registry import open_source
from ghostvis_mega.data.recipe import Recipe, load_recipe
from ghostvis_mega.data.template import load_tokenizer
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.ingest import report_dry_run
from tools.preprocess.options import DryRunOption, Json, Workers, print_json
from tools.preprocess.progress import Progress


def build_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to build.")],
    workers: Workers = 1,
    dry: DryRunOption = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare the bytes of all inputs, not their sizes and times."),
    ] = False,
    force: Annotated[bool, typer.Option(help="Build again; replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Build a dataset, its plans, statistics and exports; what is up to date is left alone.

    Killed at any moment, the same command goes on and gives the same bytes.

    The recipe: out: mix.gvd; tokenizer: {vocab: 512} or {file: tokenizer.json}; template: chatml;
    sources: a list of {format, path, images, ...} as the options of ingest; dedupe: {images: exact,
    text: exact}; plans: a list of {seq_length, tokens_per_image}; stats: a list of {seq_length,
    tokens_per_image, html, report}; exports: a list of {format, out}.

    Example: python -m tools.preprocess build mix.yaml --workers 2
    """
    loaded = load_recipe(recipe)
    meters = Meters()
    progress = Progress(meters=meters)
    if dry:
        missing = check_build(loaded, force=force)
        counted = _count(loaded, workers, progress, meters)
        progress.end()
        report_dry_run(
            counted, as_json=as_json, would_make=missing, deduped=loaded.dedupe is not None
        )
        return
    built = build(
        loaded, workers=workers, force=force, check=check, progress=progress, meters=meters
    )
    progress.end()
    counts = built.manifest.counts
    if as_json:
        print_json(
            {
                "path": str(built.path),
                "digest": built.manifest.digest,
                "up_to_date": built.up_to_date,
                "plans": list(built.plans),
                "steps": list(built.steps),
                **counts.model_dump(),
            }
        )
        return
    what = "up to date" if built.up_to_date else "built"
    print(
        f"{built.path}: {what}: {counts.samples} samples, {counts.images} images, "
        f"{counts.tokens} tokens, {counts.rejected} rows rejected, {len(built.plans)} plans"
    )
    for step in built.steps:
        print(f"  made {step}")


def _count(loaded: Recipe, workers: int, progress: Progress, meters: Meters) -> DryRun:
    """What the sources of a recipe would give."""
    if loaded.tokenizer.file is None:
        raise DataError("--dry-run counts tokens, so it needs `tokenizer.file` in the recipe")
    return dry_run(
        [open_source(spec, meters) for spec in loaded.sources],
        tokenizer=load_tokenizer(loaded.tokenizer.file, template=loaded.template),
        template=loaded.template,
        progress=progress,
        workers=workers,
        max_tokens=loaded.max_tokens,
    )
