"""The command dedupe."""

import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.operations.copying import Part, Piece, write_parts
from ghostvis_mega.data.operations.dedupe import (
    DedupeParams,
    Duplicates,
    find_duplicates,
    find_leaks,
)
from tools.preprocess.options import DatasetPath, DryRunOption, Force, Json, print_json
from tools.preprocess.progress import counting

FOUND = 1


class Match(StrEnum):
    """How alike two things must be."""

    EXACT = "exact"
    NEAR = "near"
    IGNORE = "ignore"


def dedupe_command(
    dataset: DatasetPath,
    out: Annotated[
        Path | None,
        typer.Option(metavar="NAME.gvd", help="Dataset to make; without it, only report."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="EVAL.gvd", help="Look for samples that this set holds as well."),
    ] = None,
    images: Annotated[
        Match, typer.Option(help="near: copies that were compressed or resized.")
    ] = Match.EXACT,
    text: Annotated[
        Match, typer.Option(help="near: 0.8 of the token triples are shared.")
    ] = Match.EXACT,
    report: Annotated[
        bool, typer.Option("--report", help="Only report, whatever else is said.")
    ] = False,
    force: Force = False,
    dry_run: DryRunOption = False,
    as_json: Json = False,
) -> None:
    """Find samples that are there twice, or that an evaluation set holds; --out drops them.

    Ends with 0 if nothing was found or the rest was written, with 1 if something was found and
    nothing was written, with 2 for bad input. Dropped samples are in OUT's rejects.jsonl.

    Example: python -m tools.preprocess dedupe train.gvd --images near --out clean.gvd

    Example: python -m tools.preprocess dedupe train.gvd --against eval.gvd --images near
    """
    params = DedupeParams(images=images.value, text=text.value)
    with ExitStack() as stack:
        opened = stack.enter_context(Dataset.open(dataset))
        started = time.monotonic()
        progress = counting("pictures")
        if against is None:
            found = find_duplicates(opened, params, progress=progress)
        else:
            other = stack.enter_context(Dataset.open(against))
            found = find_leaks(opened, other, params, progress=progress)
        seconds = time.monotonic() - started
        write = out is not None and not (report or dry_run)
        if write and out is not None:
            what = f"dedupe images={images} text={text}"
            if against is not None:
                what += f" against={other.manifest.digest}"
            piece = Piece(opened, found.keep, found.dropped)
            write_parts([Part(out, (piece,), what)], force=force, progress=counting("samples"))
        _report(found, opened, against, out if write else None, seconds, as_json=as_json)
    if len(found.dropped) and not write:
        raise typer.Exit(FOUND)


def _report(
    found: Duplicates,
    dataset: Dataset,
    against: Path | None,
    written: Path | None,
    seconds: float,
    *,
    as_json: bool,
) -> None:
    rate = dataset.num_samples / max(seconds, 1e-9)
    if as_json:
        report = found.report(dataset)
        report["against"] = None if against is None else str(against)
        report["written"] = None if written is None else str(written)
        report["samples_per_second"] = round(rate, 1)
        print_json(report)
        return
    what = "duplicates" if against is None else f"samples that {against} holds"
    print(
        f"{dataset.path}: {len(found.dropped)} {what} among {dataset.num_samples} samples, "
        f"{seconds:.2f} s, {rate:.0f} samples/s"
    )
    for name, count in found.counts.items():
        print(f"  {count} {name.replace('_', ' ')}")
    for example in found.report(dataset)["examples"][:5]:
        print(f"  {example['key']}: {example['reason']}, like {example['like']}")
    if written is not None:
        print(f"{written}: {len(found.keep)} samples")
    if against is None:
        print(
            "Compare with your evaluation data too: "
            f"dedupe {dataset.path} --against EVAL.gvd --images near"
        )


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("dedupe")(dedupe_command)
