"""The commands merge, split and sample."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.operations.copying import Part, Piece, part_summary, write_parts
from ghostvis_mega.data.operations.selection import (
    parse_shares,
    pick,
    split_by_image,
    split_by_keys,
    split_samples,
)
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.options import DatasetPath, DryRunOption, Force, Json, print_json
from tools.preprocess.progress import counting

Seed = Annotated[int, typer.Option(min=0, help="Seed of the choice.")]
Out = Annotated[Path, typer.Option(metavar="NAME.gvd", help="Dataset to make.")]


class By(StrEnum):
    """What a split keeps whole."""

    SAMPLE = "sample"
    IMAGE = "image"


def finish(parts: Sequence[Part], *, force: bool, dry_run: bool, as_json: bool) -> None:
    """Write the parts, or only say what they would be."""
    summaries = [part_summary(part) for part in parts]
    started = time.monotonic()
    if not dry_run:
        manifests = write_parts(parts, force=force, progress=counting("samples"))
        for summary, manifest in zip(summaries, manifests, strict=True):
            summary["digest"] = manifest.digest
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        result = {"dry_run": dry_run, "parts": summaries, "seconds": seconds}
        print_json(result)
        return
    for summary in summaries:
        print(
            f"{'would write ' if dry_run else ''}{summary['path']}: {summary['samples']} samples, "
            f"{summary['images']} images, {summary['tokens']} tokens"
        )


def merge_command(
    datasets: Annotated[list[Path], typer.Argument(metavar="A.gvd B.gvd ...", help="Parents.")],
    out: Out,
    force: Force = False,
    dry_run: DryRunOption = False,
    as_json: Json = False,
) -> None:
    """Put datasets of one tokenizer end to end; pictures that they share are stored once.

    Example: python -m tools.preprocess merge photos.gvd charts.gvd --out both.gvd
    """
    if len(datasets) < 2:
        raise DataError("merge needs at least two datasets")
    with ExitStack() as stack:
        opened = [stack.enter_context(Dataset.open(path)) for path in datasets]
        pieces = tuple(Piece(dataset, np.arange(dataset.num_samples)) for dataset in opened)
        part = Part(out, pieces, "merge")
        finish([part], force=force, dry_run=dry_run, as_json=as_json)


def _named_shares(parts: list[str]) -> tuple[list[Path], list[str]]:
    """Paths and shares of PATH=SHARE arguments."""
    paths, shares = [], []
    for part in parts:
        path, equals, share = part.rpartition("=")
        if not equals or not path:
            raise DataError(f"part {part!r} has no share: write it as train.gvd=0.9")
        paths.append(Path(path))
        shares.append(share)
    return paths, shares


def split_command(
    dataset: DatasetPath,
    parts: Annotated[
        list[str],
        typer.Option("--part", metavar="NAME.gvd=SHARE", help="Dataset to make; once for each."),
    ],
    by: Annotated[
        By, typer.Option(help="image: samples that share a picture stay in one part.")
    ] = By.SAMPLE,
    keys: Annotated[
        Path | None,
        typer.Option(help="Text file, one sample key a line; needs two --part without shares."),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRunOption = False,
    as_json: Json = False,
) -> None:
    """Divide a dataset by shares (by sample or by picture), or by a list of keys.

    Example: python -m tools.preprocess split all.gvd --part train.gvd=0.9 --part val.gvd=0.1
    --by image

    Example: python -m tools.preprocess split all.gvd --keys test.txt --part test.gvd
    --part train.gvd
    """
    if len(parts) < 2:
        raise DataError("split needs at least two --part")
    with Dataset.open(dataset) as opened:
        if keys is not None:
            if len(parts) != 2 or any("=" in part for part in parts):
                raise DataError("--keys makes two parts: give two --part without shares")
            paths, name = [Path(part) for part in parts], f"split keys={keys.name}"
            chosen = split_by_keys(opened, _key_lines(keys))
        else:
            paths, texts = _named_shares(parts)
            shares, name = (
                parse_shares(texts),
                f"split by={by} shares={','.join(texts)} seed={seed}",
            )
            chosen = (
                split_by_image(opened, shares, seed=seed)
                if by is By.IMAGE
                else split_samples(opened.num_samples, shares, seed=seed)
            )
        made = [
            Part(path, (Piece(opened, indices),), f"{name} part={number}")
            for number, (path, indices) in enumerate(zip(paths, chosen, strict=True))
        ]
        finish(made, force=force, dry_run=dry_run, as_json=as_json)


def _key_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error
    return [line for line in lines if line]


def sample_command(
    dataset: DatasetPath,
    out: Out,
    number: Annotated[int | None, typer.Option(help="How many samples to take.")] = None,
    share: Annotated[str | None, typer.Option(help="Share to take, for example 0.1.")] = None,
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRunOption = False,
    as_json: Json = False,
) -> None:
    """Take a random choice of samples; the same seed takes the same, in their old order.

    Example: python -m tools.preprocess sample all.gvd --number 1000 --seed 1 --out small.gvd
    """
    with Dataset.open(dataset) as opened:
        indices = pick(opened.num_samples, number=number, share=share, seed=seed)
        part = Part(out, (Piece(opened, indices),), f"sample of={len(indices)} seed={seed}")
        finish([part], force=force, dry_run=dry_run, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("merge")(merge_command)
    app.command("split")(split_command)
    app.command("sample")(sample_command)
