"""`verify`: whether a dataset is as it was written."""

import time
from typing import Annotated

import typer

from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.format import duration
from tools.preprocess.options import DatasetPath, Json, print_json
from tools.preprocess.progress import Steps

FOUND_PROBLEMS = 1


def verify_command(
    dataset: DatasetPath,
    deep: Annotated[
        bool,
        typer.Option(help="Also decode all images, check all records, encode some text again."),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that hash and decode.")] = 1,
    as_json: Json = False,
) -> None:
    """Compare every byte with the manifest; ends with 1 if something is wrong.

    Example: python -m tools.preprocess verify train.gvd --deep --workers 8
    """
    if not dataset.is_dir():
        raise DataError(f"{dataset} is not a directory")
    started = time.monotonic()
    problems = verify_dataset(dataset, deep=deep, progress=Steps(), workers=workers)
    seconds = time.monotonic() - started
    if as_json:
        report = {
            "path": str(dataset),
            "ok": not problems,
            "deep": deep,
            "problems": problems,
            "seconds": round(seconds, 3),
        }
        print_json(report)
    elif problems:
        print("\n".join(problems))
    else:
        checked = "every byte is as written" + (", and all content decodes" if deep else "")
        print(f"{dataset}: {checked} ({duration(seconds)})")
    if problems:
        raise typer.Exit(FOUND_PROBLEMS)
