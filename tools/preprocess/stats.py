"""`stats`: what a dataset holds, how it packs, how evenly it loads ranks."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.looks.stats_page import dataset_pictures, render_stats
from ghostvis_mega.data.looks.stats_text import stats_text
from ghostvis_mega.data.stats import DATA_PARALLEL, MIX, PATCHES_PER_IMAGE, dataset_stats, mix_stats
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import prepare_output, write_output
from tools.preprocess.options import (
    ContextParallel,
    Json,
    SegmentAlign,
    TooLong,
    TooLongOption,
    print_json,
)
from tools.preprocess.plan import alignment


class Lengths(StrEnum):
    """Synthetic mixes."""

    MIX = MIX


def stats_command(
    dataset: Annotated[
        Path | None, typer.Argument(metavar="[NAME.gvd]", help="A prepared dataset.")
    ] = None,
    lengths: Annotated[
        Lengths | None, typer.Option(help="Synthetic lengths instead of a dataset.")
    ] = None,
    seq_length: Annotated[int, typer.Option(min=1, help="Positions of one sequence.")] = 4096,
    tokens_per_image: Annotated[
        int, typer.Option(min=1, help="Positions that one image takes.")
    ] = 64,
    patches_per_image: Annotated[
        int, typer.Option(min=1, help="Patches that the tower encodes for one image.")
    ] = PATCHES_PER_IMAGE,
    dp: Annotated[str, typer.Option(help="Data-parallel sizes to simulate.")] = ",".join(
        str(ranks) for ranks in DATA_PARALLEL
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the plan.")] = 0,
    too_long: TooLongOption = TooLong.DROP,
    segment_align: SegmentAlign = None,
    context_parallel: ContextParallel = 1,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    as_json: Json = False,
) -> None:
    """Counts, lengths, fullness under each way of packing, and balance over ranks.

    Example: python -m tools.preprocess stats train.gvd --seq-length 1024 --tokens-per-image 16
    --html stats.html

    Example: python -m tools.preprocess stats --lengths ghostvis-mix
    """
    if (dataset is None) == (lengths is None):
        raise DataError("give either a dataset or --lengths ghostvis-mix")
    if html is not None:
        prepare_output(html)
    options = {
        "seq_length": seq_length,
        "tokens_per_image": tokens_per_image,
        "patches_per_image": patches_per_image,
        "data_parallel": _ranks(dp),
        "seed": seed,
        "segment_align": alignment(segment_align, context_parallel),
    }
    pictures: dict[int, bytes] = {}
    if dataset is None:
        stats = mix_stats(**options)
    else:
        with Dataset.open(dataset) as opened:
            stats = dataset_stats(opened, **options, too_long=too_long.value)
            if html is not None:
                pictures = dataset_pictures(opened, stats)
    if html is not None:
        write_output(html, render_stats(stats, pictures).encode())
    if as_json:
        print_json(stats)
    else:
        print(stats_text(stats) + (f"\n  page      {html}" if html is not None else ""))


def _ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"--dp {text!r} is no list of numbers, for example 8,32,512") from error
    if min(ranks) < 1 or max(ranks) > 65_536:
        raise DataError(f"--dp {text!r}: sizes go from 1 to 65536")
    return ranks
