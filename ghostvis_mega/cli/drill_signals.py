"""`ghostvis drill signals`: ask a run to stop, from outside; it must save and go on later."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghostvis_mega.cli.check import DeviceName
from ghostvis_mega.cli.output import AsJson, conclude, refusing_settings, scratch
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import TrainingError
from ghostvis_mega.utils.launch import device_environment
from ghostvis_mega.utils.logging import setup_logging

if TYPE_CHECKING:
    from ghostvis_mega.perf.fault_run import FaultRun

DRILL_SIGNALS_HELP = """Send SIGTERM to one rank of a run in mid-step; all must save and end.

\b
Examples (two processes on a CPU, half a minute; one GPU; a real model on two GPUs):
  python -m ghostvis_mega drill signals
  python -m ghostvis_mega drill signals --device cuda --processes 1 --json
  python -m ghostvis_mega drill signals --device cuda --out /data/drill \\
    --config examples/configs/vlm_1_5b_easyvqa.yaml parallel.tensor=2

\b
Without --config a tiny model is trained on data that the drill makes. At most the step under way
may still end; what was done must be in a checkpoint, and a second start must go on from it without
a step lost or done twice. --fault sends SIGKILL instead, and must end with 1.
Exit code: 0 all bars are kept, 1 one is missed, 2 wrong settings.
"""

Processes = Annotated[int, typer.Option(min=1, help="Ranks to start.")]
Device = Annotated[DeviceName, typer.Option(help="Where to train.")]
Out = Annotated[Path | None, typer.Option(help="For all files; a temporary folder.")]
StartTimeout = Annotated[float, typer.Option(min=1, help="Seconds for each start.")]
Config = Annotated[
    Path | None, typer.Option(help="YAML file of a run; a tiny one of the drill's own.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
]
Fault = Annotated[bool, typer.Option("--fault", help="Break it on purpose.")]


def drill_signals(
    overrides: Overrides = None,
    config: Config = None,
    processes: Processes = 2,
    device: Device = DeviceName.cpu,
    everyone: Annotated[
        bool, typer.Option("--all-ranks", help="Signal all ranks, not just the last.")
    ] = False,
    out: Out = None,
    start_timeout_s: StartTimeout = 240.0,
    fault: Fault = False,
    as_json: AsJson = False,
) -> None:
    """One run, two starts."""
    setup_logging(rank=0)
    from ghostvis_mega.perf.fault_drills import signal_drill
    from ghostvis_mega.perf.fault_run import FaultRun

    ranks = range(processes) if everyone else [processes - 1]
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
        number = signal.SIGKILL if fault else signal.SIGTERM
        rows = signal_drill(run, ranks=ranks, number=number)
    conclude(rows, title="a signal in mid-step", as_json=as_json)


def config_of(config: Path | None, folder: Path, *, device: DeviceName, processes: int) -> Path:
    """The file of settings that a drill was given, or one of its own."""
    from ghostvis_mega.perf.fault_run import write_small_run

    os.environ |= device_environment(device.value)
    if config is not None:
        return config
    return write_small_run(folder / "small", cuda=device == DeviceName.cuda, processes=processes)


def check(run: "FaultRun") -> None:
    """End with one sentence where the run cannot be, before any rank is started."""
    settings = run.settings(steps=10, save_every=0, timeout_s=300)
    with refusing_settings():
        load_checked(run.config, settings, world_size=run.processes)


@contextmanager
def telling_failures() -> Iterator[None]:
    """End with 1, and with what the ranks printed, where a start did not come as far as needed."""
    try:
        yield
    except TrainingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
