"""The command `plan`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.plan import PackPlan, PlanParams, build_plan, save_plan
from ghostvis_mega.utils.errors import DataError
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


def alignment(segment_align: int | None, context_parallel: int) -> int:
    """What samples are aligned to, from the two options that may say it."""
    needed = 2 * context_parallel if context_parallel > 1 else 1
    if segment_align is not None and segment_align % needed:
        raise DataError(
            f"--segment-align {segment_align} is not a multiple of {needed}, which "
            f"--context-parallel {context_parallel} needs: leave one of them out"
        )
    return segment_align or needed


def plan_command(
    dataset: DatasetPath,
    seq_length: Annotated[int, typer.Option(min=1, help="Positions of one sequence.")],
    tokens_per_image: Annotated[int, typer.Option(min=1, help="Positions that one image takes.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the plan; train.seed of the run.")] = 0,
    algorithm: Annotated[Packing, typer.Option(help="How samples share sequences.")] = (
        Packing.BALANCED
    ),
    group_images: Annotated[bool, typer.Option(help="Keep samples of one picture together.")] = (
        True
    ),
    too_long: TooLongOption = TooLong.DROP,
    segment_align: SegmentAlign = None,
    context_parallel: ContextParallel = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Pack, but store nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Pack a dataset and store the plan inside it; training with the same settings uses it.

    Example: python -m tools.preprocess plan train.gvd --seq-length 1024 --tokens-per-image 16

    Example: python -m tools.preprocess plan train.gvd --seq-length 32768 --tokens-per-image 64
    --context-parallel 4

    Example: python -m tools.preprocess plan text.gvd --seq-length 4096 --tokens-per-image 64
    --algorithm concat
    """
    params = PlanParams(
        algorithm=algorithm.value,
        seq_length=seq_length,
        tokens_per_image=tokens_per_image,
        seed=seed,
        group_images=group_images,
        segment_align=alignment(segment_align, context_parallel),
        too_long=too_long.value,
    )
    with Dataset.open(dataset) as opened:
        started = time.monotonic()
        plan = build_plan(opened, params)
        seconds = time.monotonic() - started
        directory = None if dry_run else save_plan(opened, plan)
    if as_json:
        print_json(_report(plan, directory, seconds))
        return
    where = "nothing is stored" if directory is None else str(directory)
    print(
        f"{where}: {len(plan.samples)} {'samples' if plan.pieces is None else 'pieces'} "
        f"in {plan.num_packs} sequences, "
        f"{100 * plan.fill:.2f} % full, {len(plan.dropped)} too long, {seconds:.2f} s"
    )


def _report(plan: PackPlan, directory: Path | None, seconds: float) -> dict[str, object]:
    return {
        "path": None if directory is None else str(directory),
        "packs": plan.num_packs,
        "cut": plan.pieces is not None,
        "fill": plan.fill,
        "dropped": len(plan.dropped),
        "segment_align": plan.params.segment_align,
        "seconds": round(seconds, 3),
    }
