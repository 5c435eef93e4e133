"""`inspect`: what stands in the sequences that training gets."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.looks.pack_page import page_pictures, render_packs
from ghostvis_mega.data.looks.pack_text import pack_json, pack_text
from ghostvis_mega.data.looks.pack_view import PackViewer
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import prepare_output, write_output
from tools.preprocess.options import (
    ContextParallel,
    DatasetPath,
    Json,
    Packing,
    SegmentAlign,
    TooLong,
    TooLongOption,
    print_json,
)
from tools.preprocess.plan import alignment


def inspect_command(
    dataset: DatasetPath,
    seq_length: Annotated[int, typer.Option(min=1, help="Positions of one sequence.")] = 4096,
    tokens_per_image: Annotated[
        int, typer.Option(min=1, help="Positions that one image takes.")
    ] = 64,
    pack: Annotated[int | None, typer.Option(min=0, help="Number of a pack.")] = None,
    key: Annotated[str | None, typer.Option(help="Source key of a sample in the pack.")] = None,
    random: Annotated[int | None, typer.Option(min=1, help="This many packs at random.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the plan and of --random.")] = 0,
    algorithm: Annotated[Packing, typer.Option(help="As data.pack_algorithm of the run.")] = (
        Packing.BALANCED
    ),
    too_long: TooLongOption = TooLong.DROP,
    segment_align: SegmentAlign = None,
    context_parallel: ContextParallel = 1,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    as_json: Json = False,
) -> None:
    """Show packs: samples, trained tokens, pictures in place, position ids, cu_seqlens.

    Example: python -m tools.preprocess inspect train.gvd --seq-length 1024 --tokens-per-image 16
    --random 3 --html packs.html
    """
    if sum(choice is not None for choice in (pack, key, random)) > 1:
        raise DataError("give only one of --pack, --key and --random")
    if html is not None:
        prepare_output(html)
    with Dataset.open(dataset) as opened:
        viewer = PackViewer(
            opened,
            seq_length=seq_length,
            tokens_per_image=tokens_per_image,
            seed=seed,
            segment_align=alignment(segment_align, context_parallel),
            algorithm=algorithm.value,
            too_long=too_long.value,
        )
        if key is not None:
            numbers = [viewer.pack_of_key(key)]
        elif random is not None:
            numbers = viewer.random_packs(random, seed=seed)
        else:
            numbers = [pack or 0]
        packs = [viewer.view(number) for number in numbers]
        if html is not None:
            page = render_packs(dataset.name, packs, page_pictures(opened, packs))
            write_output(html, page.encode())
            if not as_json:
                print(f"{html}: {len(packs)} of {viewer.num_packs} packs, {len(page) / 1e6:.2f} MB")
            if not as_json:
                return
    if as_json:
        print_json({"packs": [pack_json(view) for view in packs]})
        return
    for view in packs:
        print(pack_text(view, colour=sys.stdout.isatty()))
