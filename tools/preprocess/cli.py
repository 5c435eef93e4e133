"""The commands of `python -m tools.preprocess`."""

import json
import logging
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.plan import PlanParams, build_plan, save_plan
from ghostvis_mega.utils.errors import GhostVisError
from tools.preprocess import dedupe, export, operations
from tools.preprocess.build import build_command
from tools.preprocess.demo_blend import demo_blend_command
from tools.preprocess.ingest import ingest_command
from tools.preprocess.inspect_packs import inspect_command
from tools.preprocess.stats import stats_command
from tools.preprocess.train_tokenizer import train_tokenizer_command
from tools.preprocess.verify_dataset import verify_command

BAD_INPUT = 2

app = typer.Typer(
    help="Turn raw data into prepared datasets (NAME.gvd).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Packing(StrEnum):
    """Packing algorithms."""

    BALANCED = "balanced"
    BFD = "bfd"
    NONE = "none"


DatasetPath = Annotated[Path, typer.Argument(metavar="NAME.gvd", help="A prepared dataset.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
SeqLength = Annotated[int, typer.Option(min=1, help="Positions of one sequence.")]
TokensPerImage = Annotated[int, typer.Option(min=1, help="Positions that one image takes.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the plan; train.seed of the run.")]


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


app.command("train-tokenizer")(train_tokenizer_command)
app.command("ingest")(ingest_command)
app.command("build")(build_command)
app.command("demo-blend")(demo_blend_command)


@app.command("plan")
def plan_command(
    dataset: DatasetPath,
    seq_length: SeqLength,
    tokens_per_image: TokensPerImage,
    seed: Seed = 0,
    algorithm: Annotated[Packing, typer.Option(help="How samples share sequences.")] = (
        Packing.BALANCED
    ),
    group_images: Annotated[bool, typer.Option(help="Keep samples of one picture together.")] = (
        True
    ),
    as_json: Json = False,
) -> None:
    """Pack a dataset and store the plan inside it; training with the same settings uses it.

    Example: python -m tools.preprocess plan train.gvd --seq-length 1024 --tokens-per-image 16
    """
    params = PlanParams(
        algorithm=algorithm.value,
        seq_length=seq_length,
        tokens_per_image=tokens_per_image,
        seed=seed,
        group_images=group_images,
    )
    with Dataset.open(dataset) as opened:
        started = time.monotonic()
        plan = build_plan(opened, params)
        seconds = time.monotonic() - started
        directory = save_plan(opened, plan)
    if as_json:
        _print_json(
            {
                "path": str(directory),
                "packs": plan.num_packs,
                "fill": plan.fill,
                "dropped": len(plan.dropped),
                "seconds": round(seconds, 3),
            }
        )
        return
    print(
        f"{directory}: {len(plan.samples)} samples in {plan.num_packs} sequences, "
        f"{100 * plan.fill:.2f} % full, {len(plan.dropped)} too long, {seconds:.2f} s"
    )


operations.register(app)
export.register(app)
dedupe.register(app)


app.command("stats")(stats_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 and one sentence for bad input. Usage errors end with SystemExit(2)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(args=arguments)
    except GhostVisError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0
