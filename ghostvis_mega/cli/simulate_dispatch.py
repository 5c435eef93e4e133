"""`ghostvis simulate dispatch`: how pictures spread over 8 to thousands of ranks, planned here."""

from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.logging import setup_logging

SIMULATE_DISPATCH_HELP = """Plan batches and picture dispatch for large worlds, without any process.

\b
Examples (about a minute on one core; worlds up to 512 ranks alone: 15 seconds):
  python -m ghostvis_mega simulate dispatch
  python -m ghostvis_mega simulate dispatch --ranks 64,512 --native --json
  python -m ghostvis_mega simulate dispatch --data sft.gvd --tensor 2 --pipeline 1 --global-size 512

\b
Packs are made by the planner and dealt to replicas as in training. With few pictures a rank nothing
can be even: 3.2 a rank is 4 for somebody, and the row "least possible" says so.
Exit code: 0 fine, 1 a bar is missed, 2 wrong options.
"""


def simulate_dispatch(
    mix: Annotated[str, typer.Option(help="Synthetic lengths: ghostvis-mix.")] = "ghostvis-mix",
    data: Annotated[
        Path | None, typer.Option(help="A prepared dataset instead of the mix.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="World sizes, comma between.")] = "8,64,512,4096",
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree.")] = 4,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 2,
    context: Annotated[
        int, typer.Option(min=1, help="Context-parallel degree; bytes are then an estimate.")
    ] = 1,
    seq_length: Annotated[int, typer.Option(min=1, help="Positions of a pack.")] = 4096,
    tokens_per_image: Annotated[int, typer.Option(min=1, help="Positions of a picture.")] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Width of an embedding.")] = 3584,
    packs_per_replica: Annotated[int, typer.Option(min=1, help="Packs of each replica.")] = 16,
    global_size: Annotated[
        int | None, typer.Option(min=1, help="Packs of a step, whatever the world.")
    ] = None,
    native: Annotated[
        bool,
        typer.Option(
            "--native",
            help="Pictures in their own resolution, patches of 14; training has one size.",
        ),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to simulate.")] = 20,
    seed: Annotated[int, typer.Option(help="Of lengths, plan and order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Print imbalance, bytes and planning time for each world size."""
    if mix != "ghostvis-mix":
        raise typer.BadParameter("the only mix is ghostvis-mix; give a dataset to --data")
    words = ranks.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"--ranks {ranks}: give numbers such as 8,64,512")
    setup_logging(rank=0)
    from ghostvis_mega.data.dataset import Dataset
    from ghostvis_mega.parallel.volume import embedding_bytes
    from ghostvis_mega.perf import dispatch_simulation as simulation

    sizes = {
        "seq_length": seq_length,
        "tokens_per_image": tokens_per_image,
        # What context parallelism needs of the samples of a pack.
        "segment_align": 2 * context if context > 1 else 1,
    }
    shape = simulation.Shape(tensor, pipeline, context, packs_per_replica, global_size)
    try:
        if data is None:
            packs = simulation.mix_packs(**sizes, native=native, seed=seed)
        else:
            packs = simulation.dataset_packs(Dataset.open(data), **sizes, native=native, seed=seed)
        rows = simulation.simulate(
            packs,
            shape,
            worlds=[int(word) for word in words],
            steps=steps,
            bytes_per_image=embedding_bytes(tokens_per_image=tokens_per_image, hidden_size=hidden),
            seed=seed,
        )
    except GhostVisError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    title = f"picture dispatch of {data or mix}, tensor {tensor} x pipeline {pipeline}"
    conclude(rows, title=f"{title} x context {context}", as_json=as_json)
