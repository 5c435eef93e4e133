"""`verify`: whether a dataset is as it was written."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.format import duration, si

FOUND_PROBLEMS = 1
_REPORT_EVERY_S = 2.0


class _Reporter:
    """A line on stderr now and then: what is looked at, how far, how fast, how long still."""

    def __init__(self) -> None:
        self._what = ""
        self._started = self._told = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Count; print if the last line is old enough."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._started = what, now
        if now - self._told < _REPORT_EVERY_S:
            return
        self._told = now
        rate = done / max(now - self._started, 1e-9)
        left = duration((total - done) / rate) if rate else "-"
        print(f"{what}: {si(done)} of {si(total)}, {si(rate)}/s, {left} left", file=sys.stderr)


def verify_command(
    dataset: Annotated[Path, typer.Argument(metavar="NAME.gvd", help="A prepared dataset.")],
    deep: Annotated[
        bool,
        typer.Option(help="Also decode all images, check all records, encode some text again."),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that hash and decode.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Compare every byte with the manifest; ends with 1 if something is wrong.

    Example: python -m tools.preprocess verify train.gvd --deep --workers 8
    """
    if not dataset.is_dir():
        raise DataError(f"{dataset} is not a directory")
    started = time.monotonic()
    problems = verify_dataset(dataset, deep=deep, progress=_Reporter(), workers=workers)
    seconds = time.monotonic() - started
    if as_json:
        report = {
            "path": str(dataset),
            "ok": not problems,
            "deep": deep,
            "problems": problems,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(report, indent=2, sort_keys=True))
    elif problems:
        print("\n".join(problems))
    else:
        checked = "every byte is as written" + (", and all content decodes" if deep else "")
        print(f"{dataset}: {checked} ({duration(seconds)})")
    if problems:
        raise typer.Exit(FOUND_PROBLEMS)
