"""`ghostvis bench fp8`: the loss of a run in FP8 beside that of the same run in BF16."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ghostvis_mega.cli.output import (
    EXIT_WRONG_SETTINGS,
    AsJson,
    conclude,
    refusing_settings,
    scratch,
)
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.loss_gap_runs import Variant, train_variants
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.figures import Figure, measured
from ghostvis_mega.utils.hardware import has_cuda_device
from ghostvis_mega.utils.logging import setup_logging

if TYPE_CHECKING:
    from ghostvis_mega.perf.loss_gap import Curve

log = logging.getLogger(__name__)

BENCH_FP8_HELP = """Train a run in BF16 and in FP8, on the same batches, and compare the losses.

\b
Examples (one GPU; each run is a launch of its own; the last is a try on a CPU, BF16 alone):
  python -m ghostvis_mega bench fp8 examples/configs/vlm_fp8_easyvqa.yaml --recipe delayed
  python -m ghostvis_mega bench fp8 RUN.yaml --recipe delayed --recipe tensorwise \\
    --side-by-side --json
  python -m ghostvis_mega bench fp8 RUN.yaml train.device=cpu --recipe none --steps 2

\b
The bar is on the mean loss of the last tenth of the steps. --twin is the noise beside it: BF16
again with a setting that changes rounding alone. --recipe none is BF16 once more. --fault halves
the learning rate of the compared runs' LLM, and must end with 1.
Exit code: 0 within the bar, 1 a gap above it or a failed run, 2 wrong settings or no GPU for FP8.
"""

BASE = "BF16"
_BF16 = "train.fp8=none"
_LEAST_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
"""CUDA compute capability of the first GPUs that have the units of a recipe."""


class Recipe(StrEnum):
    """Values of `train.fp8`."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    none = "none"


def bench_fp8(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    recipe: Annotated[
        list[Recipe] | None, typer.Option(help="Of FP8; repeatable; delayed.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 500,
    bar: Annotated[float, typer.Option(min=0, help="Largest gap, percent of the loss.")] = 0.3,
    twin: Annotated[
        list[str] | None,
        typer.Option(
            help='"section.key=value ..."; repeatable; train.fused_loss, the other way.',
            show_default=False,
        ),
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="All runs at once, on the same GPUs.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Ranks of each run.")] = 1,
    timeout_s: Annotated[float, typer.Option(min=1, help="For each launch.")] = 1800.0,
    out: Annotated[
        Path | None, typer.Option(help="Where a folder with all runs is made and deleted.")
    ] = None,
    fault: Annotated[bool, typer.Option("--fault", help="Break it on purpose.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check all runs, train them, compare their metrics."""
    setup_logging(rank=0)
    recipes = list(dict.fromkeys(recipe or [Recipe.delayed]))
    with scratch("fp8", out) as folder:
        plan = _plan(
            config,
            overrides or [],
            recipes,
            twin or [],
            folder,
            steps=steps,
            processes=processes,
            fault=fault,
        )
        failures = train_variants(
            config,
            plan.variants,
            processes=processes,
            device=plan.device,
            timeout_s=timeout_s,
            side_by_side=side_by_side,
        )
        _tell(failures)
        rows, table = _compare(plan, failures, steps=steps, bar=bar, alone=not side_by_side)
    if as_json:
        rows.append(measured("report", table))
    else:
        typer.echo(table)
    conclude(rows, title=f"{steps} steps of {config}", as_json=as_json)


def _common(steps: int) -> list[str]:
    """What holds for all runs, but where a run has its own: nothing that only costs time."""
    return [
        f"train.steps={steps}",
        "train.precision=bf16",
        _BF16,
        # A step that one of the runs leaves out would part it from the others.
        "guards.spike=none",
        "checkpoint.save_every=0",
        "checkpoint.save_at_end=false",
        "checkpoint.export_hf=none",
        "checkpoint.resume=none",
        "log.preview_steps=[]",
        "log.evaluate=false",
        "log.tensorboard=false",
        "log.wandb=disabled",
    ]


def _checked(config: Path, settings: Sequence[str], *, processes: int) -> RunConfig:
    """The run, or the end with all that is wrong with it."""
    with refusing_settings():
        return load_checked(config, settings, world_size=processes)


@dataclass(frozen=True)
class Trial:
    """One run of the comparison: its place in it, and what it has of its own."""

    name: str
    role: Literal["base", "twin", "compared"]
    settings: tuple[str, ...]

    def variant(self, common: Sequence[str], folder: Path) -> Variant:
        """How it is launched."""
        settings = (*common, *self.settings, f"log.output={folder}/run")
        return Variant(self.name, settings, folder)


@dataclass(frozen=True)
class Plan:
    """All runs of the comparison, checked."""

    trials: list[Trial]
    variants: list[Variant]
    """How each of them is launched."""
    device: Literal["cpu", "cuda"]


def _plan(
    config: Path,
    given: list[str],
    recipes: list[Recipe],
    twins: list[str],
    folder: Path,
    *,
    steps: int,
    processes: int,
    fault: bool,
) -> Plan:
    """Every run, or the end with all that is wrong with one."""
    _refuse_what_it_sets(given)
    common = [*given, *_common(steps)]
    run = _checked(config, [*common, f"log.output={folder}/run"], processes=processes)
    trials = _trials(run, recipes, twins or [_other_loss(run)], fault=fault)
    variants = [trial.variant(common, folder / str(i)) for i, trial in enumerate(trials)]
    for variant in variants:
        _checked(config, variant.settings, processes=processes)
    on_gpu = run.train.device != "cpu" and has_cuda_device()
    if on_gpu:
        _check_gpu(recipes)
    return Plan(trials, variants, "cuda" if on_gpu else "cpu")


def _refuse_what_it_sets(given: list[str]) -> None:
    for text in given:
        if text.partition("=")[0] in ("train.fp8", "train.precision", "train.steps"):
            typer.echo(
                f"{text}: bench fp8 sets that itself. Use --recipe and --steps; BF16 is always "
                "the run that recipes are compared with.",
                err=True,
            )
            raise typer.Exit(EXIT_WRONG_SETTINGS)


def _trials(run: RunConfig, recipes: list[Recipe], twins: list[str], *, fault: bool) -> list[Trial]:
    """The base first."""
    broken = (f"optim.lr.llm={run.optim.lr.llm / 2!r}",) if fault else ()
    trials = [Trial(BASE, "base", (_BF16,))]
    for text in dict.fromkeys(twins):
        trials.append(Trial(f"{BASE}, {text}", "twin", (*text.split(), _BF16)))
    for recipe in recipes:
        name = f"{BASE} again" if recipe == Recipe.none else f"FP8 {recipe.value}"
        name += ", half the rate" if fault else ""
        trials.append(Trial(name, "compared", (f"train.fp8={recipe.value}", *broken)))
    return trials


def _other_loss(run: RunConfig) -> str:
    """The setting that computes the same loss in another order."""
    return f"train.fused_loss={str(not run.train.fused_loss).lower()}"


def _check_gpu(recipes: list[Recipe]) -> None:
    """End with one sentence where this machine's GPU lacks the units of a recipe."""
    import torch

    capability, name = torch.cuda.get_device_capability(0), torch.cuda.get_device_name(0)
    for recipe in recipes:
        least = _LEAST_CAPABILITY.get(recipe.value, (0, 0))
        if capability < least:
            typer.echo(
                f"train.fp8={recipe.value} needs CUDA compute capability {least[0]}.{least[1]}, "
                f"but {name} has {capability[0]}.{capability[1]}. Use a Hopper GPU or newer.",
                err=True,
            )
            raise typer.Exit(EXIT_WRONG_SETTINGS)


def _tell(failures: dict[str, str]) -> None:
    """Show what failed; without the base there is nothing to compare."""
    for failure in failures.values():
        typer.echo(failure, err=True)
    if BASE in failures:
        typer.echo(f"the {BASE} run failed, so that there is nothing to compare", err=True)
        raise typer.Exit(1)


def _compare(
    plan: Plan, failures: Collection[str], *, steps: int, bar: float, alone: bool
) -> tuple[list[Figure], str]:
    """Rows, and the table of losses."""
    from ghostvis_mega.perf.loss_gap import compare_losses, losses_table, read_curve

    curves: dict[str, list[Curve]] = {"base": [], "twin": [], "compared": []}
    try:
        for trial, variant in zip(plan.trials, plan.variants, strict=True):
            if trial.name not in failures:
                path = variant.folder / "run" / "metrics.jsonl"
                curves[trial.role].append(read_curve(trial.name, path, steps=steps))
    except DataError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    (base,), twins, others = curves.values()
    rows = compare_losses(base, twins, others, bar_percent=bar, alone=alone)
    for row in rows:
        if str(row["value"]).startswith("SLOWER"):
            log.warning("%s: %s", row["name"], row["value"])
    rows += [measured(f"{name}: failed", "see its messages", ok=False) for name in failures]
    return rows, losses_table([base, *twins, *others])
