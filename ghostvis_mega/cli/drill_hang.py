"""`ghostvis drill hang`: stop one rank of a run; the others must find it, name it and end."""

from typing import Annotated

import typer

from ghostvis_mega.cli.check import DeviceName
from ghostvis_mega.cli.drill_signals import (
    Config,
    Device,
    Fault,
    Out,
    Overrides,
    Processes,
    StartTimeout,
    check,
    config_of,
    telling_failures,
)
from ghostvis_mega.cli.output import AsJson, conclude, scratch
from ghostvis_mega.utils.logging import setup_logging

DRILL_HANG_HELP = """Stop one rank with SIGSTOP; the others must report it in time and end with 70.

\b
Examples (two processes on a CPU, a minute; two GPUs, two to three minutes):
  python -m ghostvis_mega drill hang --step-timeout-s 20
  python -m ghostvis_mega drill hang --device cuda --json
  python -m ghostvis_mega drill hang --fault

\b
Bar: the time limit of a step and 5 seconds. The report must name the rank that was stopped, and the
last call and the Python stacks of all others; a second start must go on from the last checkpoint.
Without --config a tiny model is trained on data that the drill makes. The time limit also holds
from a start to its first step, so it should not be shorter than that takes. --fault stops no rank,
and must end with 1.
Exit code: 0 all bars are kept, 1 one is missed, 2 wrong settings.
"""


def drill_hang(
    overrides: Overrides = None,
    config: Config = None,
    processes: Processes = 2,
    device: Device = DeviceName.cpu,
    rank: Annotated[int, typer.Option(min=0, help="To stop.")] = 1,
    step_timeout_s: Annotated[float, typer.Option(min=5, help="train.timeout_s of the run.")] = 60,
    out: Out = None,
    start_timeout_s: StartTimeout = 240.0,
    fault: Fault = False,
    as_json: AsJson = False,
) -> None:
    """One run, two starts."""
    setup_logging(rank=0)
    if processes < 2 or rank >= processes:
        raise typer.BadParameter(
            f"with --processes {processes} nobody would wait for rank {rank}: use at least 2 "
            "processes, and a rank below their number",
            param_hint="--rank",
        )
    from ghostvis_mega.perf.fault_drills import hang_drill
    from ghostvis_mega.perf.fault_run import FaultRun

    with scratch("drill", out) as folder, telling_failures():
        run = FaultRun(
            config=config_of(config, folder, device=device, processes=processes),
            overrides=tuple(overrides or ()),
            folder=folder,
            processes=processes,
            device=device.value,
            start_timeout_s=start_timeout_s,
        )
        check(run)
        rows = hang_drill(run, rank=rank, timeout_s=step_timeout_s, fault=fault)
    conclude(rows, title="a rank that does not answer", as_json=as_json)
