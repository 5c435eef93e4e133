"""`ghostvis bench convert`: models of the true shapes from Hugging Face to ours and back."""

from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude, scratch
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.figures import Figure
from ghostvis_mega.utils.logging import setup_logging

BENCH_CONVERT_HELP = """Convert random weights of true shapes there and back: bits, memory, time.

\b
Examples (the second needs 31 GB of disk and takes some minutes):
  python -m ghostvis_mega bench convert --model qwen25_1_5b
  python -m ghostvis_mega bench convert --model qwen25_7b --folder /scratch

\b
Time counts against a plain copy of the same files in the same run, each with its wait for the disk;
memory is that of a process that converts. Exit code: 0 every bar is met, 1 one is missed.
"""


def bench_convert(
    model: Annotated[
        list[str] | None,
        typer.Option(help="qwen25_1_5b, qwen25_7b, llava_siglip, llava_clip; repeatable; all."),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where there is room.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each step; the best counts.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Measure conversion."""
    setup_logging(rank=0)
    from ghostvis_mega.convert.bench import MODELS, bench_model

    rows: list[Figure] = []
    try:
        for name in model or MODELS:
            with scratch("bench", folder) as place:
                rows += bench_model(
                    name,
                    place,
                    rounds=rounds,
                    progress=lambda text: typer.echo(text, err=True),
                )
    except GhostVisError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    conclude(rows, title="conversion", as_json=as_json)
