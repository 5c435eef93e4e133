"""Options that several commands share, and how their results are printed."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DatasetPath = Annotated[Path, typer.Argument(metavar="NAME.gvd", help="A prepared dataset.")]
Force = Annotated[bool, typer.Option(help="Replace what is there.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check and count; write nothing.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes that decode and tokenise; the result is the same.")
]
Images = Annotated[Path | None, typer.Option(help="Folder of the images.")]
Annotations = Annotated[Path | None, typer.Option(help="Second file of rows (vqav2).")]


class Packing(StrEnum):
    """How samples share sequences; `concat` cuts samples where sequences end."""

    BALANCED = "balanced"
    BFD = "bfd"
    CONCAT = "concat"
    NONE = "none"


class TooLong(StrEnum):
    """What becomes of samples longer than a sequence."""

    DROP = "drop"
    TRUNCATE = "truncate-at-turn"
    SPLIT = "split-text"


TooLongOption = Annotated[
    TooLong,
    typer.Option(
        "--too-long",
        help="Samples longer than a sequence: leave out, keep the turns that fit, or cut documents;"
        " never inside an image.",
    ),
]
SegmentAlign = Annotated[
    int | None, typer.Option(min=1, help="Round each sample of a sequence up to such a multiple.")
]
ContextParallel = Annotated[
    int,
    typer.Option(min=1, help="parallel.context of the run; aligns samples to twice as much."),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=2, help="Cut documents (never conversations) to this."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first rows only.")]


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, sort_keys=True))
