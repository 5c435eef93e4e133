"""`ghostvis bench train`: training speed of our layouts beside peers, row by row."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.bench_train_tables import print_tables
from ghostvis_mega.cli.output import (
    AsJson,
    print_rows,
    refusing_settings,
    scratch,
)
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.train_bench.launches import Order, run_row
from ghostvis_mega.perf.train_bench.plans import Plan
from ghostvis_mega.perf.train_bench.presets import PRESETS, preset_plan
from ghostvis_mega.perf.train_bench.progress import Bench, Stopped, stopping
from ghostvis_mega.perf.train_bench.results import failed, ratio_figures
from ghostvis_mega.perf.train_bench.rows import (
    KINDS,
    Row,
    choose_rows,
    parse_ratio,
    parse_row,
    peer_problems,
)
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.figures import any_missed
from ghostvis_mega.utils.hardware import has_cuda_device
from ghostvis_mega.utils.logging import setup_logging

log = logging.getLogger(__name__)

BENCH_TRAIN_HELP = f"""Time training, ours and peers, each row in a launch of its own.

\\b
Examples:
  python -m ghostvis_mega bench train --preset tiny --processes 2
  python -m ghostvis_mega bench train --preset text-7b --processes 4 --json
  python -m ghostvis_mega bench train RUN.yaml --ratio "kept / again >= 1" \\
    --row "again: tower.backward=recompute" --row "kept: tower.backward=keep"
  python -m ghostvis_mega bench train RUN.yaml --row "ours:" \\
    --row "HF: peer=hf data.packing=false batch.micro_size=2" --trace runs/traces

\\b
A row is NAME: followed by settings of the run file, by env.VARIABLE=value for its processes, and by
peer=KIND where it is not ours: KIND is {", ".join(KINDS[1:])}.
With may-not-fit it may run out of memory without being a failure. In a ratio "A | B" is the fastest
of them.
Presets: {", ".join(PRESETS)}.
Exit code: 0 measured, 1 a row failed, a loss did not fall or a bar is missed, 2 wrong settings,
128 + n stopped by signal n.
"""

SIGNALLED = 128
"""Added to the number of a signal, as shells do."""
TARGET = ("-m", "ghostvis_mega.cli.bench_train_rank")


def bench_train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of the run.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    preset: Annotated[str, typer.Option(help="In place of a run file.")] = "",
    row: Annotated[
        list[str] | None, typer.Option(help='"NAME: settings"; repeatable.', show_default=False)
    ] = None,
    ratio: Annotated[
        list[str] | None, typer.Option(help='"ROW / ROW >= 1.1"; repeatable.', show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Row to run; repeatable.", show_default=False)
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks of each row.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each row.")] = 8,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 3,
    seq_length: Annotated[int, typer.Option(min=0, help="Of a preset; 0: its own.")] = 0,
    row_timeout: Annotated[float, typer.Option(min=1, help="Seconds for each row.")] = 600.0,
    trace: Annotated[
        Path | None, typer.Option(help="Folder for traces of one more step.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder to keep a preset's data in.", show_default=False)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="JSON file, rewritten after each row.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check all rows, then run one after the other."""
    setup_logging(rank=0)
    # A run file is told from a setting by its place, also where a preset stands in for it.
    if preset and config is not None:
        overrides, config = [str(config), *(overrides or [])], None
    with scratch("bench-train", None) as folder:
        with refusing_settings():
            plan = _plan(config, preset, row, ratio, processes, seq_length, data or folder / "data")
            chosen = choose_rows(plan.rows, plan.ratios, only or ())
            _prepare(plan, chosen)
            file = plan.write(folder) if config is None else config
            total = warm_up + steps + (trace is not None)
            runs = load_rows(
                file, overrides or (), chosen, folder=folder, processes=processes, steps=total
            )
            bench = Bench(title=preset or str(config), plan=plan, chosen=chosen, file=save)
            bench.save()
        number = _run_rows(
            bench,
            runs,
            folder=folder,
            processes=processes,
            warm_up=warm_up,
            steps=steps,
            timeout_s=row_timeout,
            trace=trace,
        )
    _conclude(bench, as_json=as_json, signal_number=number)


def _plan(
    config: Path | None,
    preset: str,
    row: list[str] | None,
    ratio: list[str] | None,
    processes: int,
    seq_length: int,
    data: Path,
) -> Plan:
    """What is asked for, from a preset or from the command line."""
    if (config is None) == (not preset):
        raise ConfigError(["give either a run file or --preset."])
    if preset:
        plan = preset_plan(preset, processes=processes, seq_length=seq_length, data=data)
    elif seq_length:
        raise ConfigError(["--seq-length is for presets. Use data.seq_length=... instead."])
    else:
        plan = Plan()
    return plan.with_more([parse_row(t) for t in row or ()], [parse_ratio(t) for t in ratio or ()])


def _prepare(plan: Plan, chosen: Sequence[Row]) -> None:
    needs = plan.needs(chosen)
    if needs:
        from ghostvis_mega.perf.train_bench.data import prepare

        prepare(needs)


def load_rows(
    file: Path,
    overrides: Sequence[str],
    rows: Sequence[Row],
    *,
    folder: Path,
    processes: int,
    steps: int,
) -> list[RunConfig]:
    """Settings of every row, all of them checked before the first one starts.

    Raises:
        ConfigError: With the problems of all rows.
    """
    runs, problems = [], []
    for number, row in enumerate(rows):
        # What a timing needs, whatever the file says: weights from nowhere, saved nowhere.
        fixed = [
            f"train.steps={steps}",
            "optim.warmup_steps=0",
            "guards.spike=none",
            "data.heldout=null",
            "data.blend_changes=[]",
            "log.evaluate=false",
            "log.preview_steps=[]",
            f"log.output={folder}/run{number}",
            "checkpoint.resume=none",
            "checkpoint.weights=null",
            "checkpoint.weights_of=[]",
            "checkpoint.save_every=0",
            "checkpoint.save_at_end=false",
        ]
        try:
            run = load_checked(file, [*overrides, *row.settings, *fixed], world_size=processes)
        except ConfigError as error:
            problems += [f"row {row.name!r}: {problem}" for problem in error.problems]
            continue
        problems += peer_problems(row, run)
        runs.append(run)
    if problems:
        raise ConfigError(problems)
    return runs


def _run_rows(
    bench: Bench,
    runs: Sequence[RunConfig],
    *,
    folder: Path,
    processes: int,
    warm_up: int,
    steps: int,
    timeout_s: float,
    trace: Path | None,
) -> int:
    """Run one row after the other, each told and kept as soon as it has ended.

    Returns:
        0, or the number of the signal that asked to stop; the row that ran is then a failed one.
    """
    try:
        with stopping():
            for number, (row, run) in enumerate(zip(bench.chosen, runs, strict=True)):
                log.info("row %d of %d: %s", number + 1, len(bench.chosen), row.name)
                order = Order(
                    row=row,
                    run=run,
                    warm_up=warm_up,
                    steps=steps,
                    folder=folder / f"row{number}",
                    trace=None if trace is None else trace.absolute(),
                )
                device = "cuda" if run.train.device != "cpu" and has_cuda_device() else "cpu"
                began = time.monotonic()
                result = run_row(
                    order, target=TARGET, processes=processes, timeout_s=timeout_s, device=device
                )
                log.info("%s: took %.0f s in all", row.name, time.monotonic() - began)
                bench.add(result)
    except Stopped as stop:
        log.error("%s", stop)
        if len(bench.results) < len(bench.chosen):
            bench.add(failed(bench.chosen[len(bench.results)], str(stop)))
        return stop.number
    return 0


def _conclude(bench: Bench, *, as_json: bool, signal_number: int) -> None:
    """Print all figures; end with 1 where a row failed or a bar is missed, and as a signal ends a
    process where one asked to stop."""
    rows, results = bench.figures(), bench.results
    if as_json:
        print_rows(rows, title=bench.title, as_json=True)
    else:
        print_tables(results, bars=bench.bars(), title=bench.title)
        compared = ratio_figures(results, bench.plan.ratios)
        promised = [row for row in rows if row["bar"] is not None and row not in compared]
        if compared or promised:
            print_rows([*compared, *promised], title="compared and promised", as_json=False)
    if signal_number:
        raise typer.Exit(SIGNALLED + signal_number)
    if any_missed(rows):
        raise typer.Exit(1)
