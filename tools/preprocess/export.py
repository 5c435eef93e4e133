"""The commands export webdataset, export energon and export megatron."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.energon import SPLITS, export_energon
from ghostvis_mega.data.export.files import check_target
from ghostvis_mega.data.export.megatron import export_megatron, text_samples
from ghostvis_mega.data.export.webdataset import SHARD_BYTES, export_webdataset, plan_tars
from tools.preprocess.options import DatasetPath, DryRunOption, Force, Json, print_json
from tools.preprocess.progress import counting

_MIB = 1 << 20

export_app = typer.Typer(
    help="Write a prepared dataset in the format of another program.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Out = Annotated[Path, typer.Option(metavar="DIRECTORY", help="Directory to make.")]
ShardSize = Annotated[
    int, typer.Option(min=1, help="A tar is closed when it holds so many MiB.", metavar="MIB")
]


def _print(
    document: dict[str, Any], out: Path, seconds: float, *, dry: bool, as_json: bool
) -> None:
    document = {"path": str(out), "dry_run": dry, "seconds": round(seconds, 3), **document}
    if as_json:
        print_json(document)
        return
    count = document.get("samples", document.get("documents"))
    verb = "would hold" if dry else "holds"
    rate = "" if dry else f", {count / max(seconds, 1e-9):.0f} samples/s"
    print(f"{out} {verb} {count} samples{rate}")


@export_app.command("webdataset")
def webdataset_command(
    dataset: DatasetPath,
    out: Out,
    shard_size: ShardSize = SHARD_BYTES // _MIB,
    force: Force = False,
    dry_run: DryRunOption = False,
    as_json: Json = False,
) -> None:
    """Tars with KEY.jpg and KEY.json, as the webdataset library reads them.

    Example: python -m tools.preprocess export webdataset train.gvd --out train-wds
    """
    _export_tars("webdataset", dataset, out, shard_size, "", force, dry_run, as_json)


@export_app.command("energon")
def energon_command(
    dataset: DatasetPath,
    out: Out,
    split: Annotated[str, typer.Option(help=f"One of {', '.join(SPLITS)}.")] = "train",
    shard_size: ShardSize = SHARD_BYTES // _MIB,
    force: Force = False,
    dry_run: DryRunOption = False,
    as_json: Json = False,
) -> None:
    """A directory that megatron-energon 7 opens without `energon prepare`.

    Example: python -m tools.preprocess export energon train.gvd --out train-energon
    """
    _export_tars("energon", dataset, out, shard_size, split, force, dry_run, as_json)


def _export_tars(
    fmt: str,
    path: Path,
    out: Path,
    shard_size: int,
    split: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    started = time.monotonic()
    with Dataset.open(path) as dataset:
        if dry_run:
            check_target(out, force=force)
            document = plan_tars(dataset)
        else:
            size, progress = shard_size * _MIB, counting("samples")
            if fmt == "energon":
                document = export_energon(
                    dataset, out, split=split, shard_bytes=size, force=force, progress=progress
                )
            else:
                document = export_webdataset(
                    dataset, out, shard_bytes=size, force=force, progress=progress
                )
    _print(document, out, time.monotonic() - started, dry=dry_run, as_json=as_json)


@export_app.command("megatron")
def megatron_command(
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Makes PREFIX.bin, .idx, .json.")],
    append_eod: Annotated[
        bool, typer.Option(help="End each document with the end-of-text token.")
    ] = False,
    skip_images: Annotated[
        bool, typer.Option(help="Leave out samples with pictures, instead of refusing.")
    ] = False,
    force: Force = False,
    dry_run: DryRunOption = False,
    as_json: Json = False,
) -> None:
    """Text samples as Megatron's IndexedDataset (.bin and .idx).

    Example: python -m tools.preprocess export megatron text.gvd --out text_document
    """
    started = time.monotonic()
    with Dataset.open(dataset) as opened:
        if dry_run:
            count = len(text_samples(opened, skip_images=skip_images))
            document: dict[str, Any] = {"documents": count}
        else:
            document = export_megatron(
                opened,
                out,
                append_eod=append_eod,
                skip_images=skip_images,
                force=force,
                progress=counting("samples"),
            )
    _print(document, out, time.monotonic() - started, dry=dry_run, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(export_app, name="export")
