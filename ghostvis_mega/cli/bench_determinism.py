"""`ghostvis bench determinism`: equal runs, equal bits, and what the switch costs."""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.output import AsJson, conclude, refusing_settings
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.hardware import has_cuda_device
from ghostvis_mega.utils.launch import RankError, RankHang, device_environment, run_ranks
from ghostvis_mega.utils.logging import setup_logging

BENCH_DETERMINISM_HELP = """Run twice with train.deterministic and once without; compare every bit.

\b
Examples (each run is a launch of its own):
  python -m ghostvis_mega bench determinism examples/configs/vlm_tiny_easyvqa.yaml --steps 20
  python -m ghostvis_mega bench determinism RUN.yaml parallel.tensor=2 --processes 4 --json
  python -m ghostvis_mega bench determinism RUN.yaml --fault noise

\b
Losses and gradient norms of all steps, and the digest of all weights and optimizer states after the
last, must be equal. --fault noise spoils the second run's last bits, and must end with 1.
Exit code: 0 equal, 1 a bit differs or a run failed, 2 wrong settings.
"""

FILE_VARIABLE = "GHOSTVIS_DETERMINISM_FILE"
RUNS = {"first": True, "second": True, "plain": False}
"""Runs, and whether they have the switch."""


def bench_determinism(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 10,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 1,
    timeout_s: Annotated[float, typer.Option(min=1, help="For each run.")] = 1800.0,
    fault: Annotated[str, typer.Option(help="noise: spoil the second run.")] = "",
    as_json: AsJson = False,
) -> None:
    """Start the three runs, or be a rank of one."""
    if fault not in ("", "noise"):
        raise typer.BadParameter(f"{fault} is not known; use noise", param_hint="--fault")
    target = os.environ.get(FILE_VARIABLE)
    rank = int(os.environ["RANK"]) if target else 0
    setup_logging(rank=rank)
    given = list(overrides or [])
    # Here, what the runs will have is checked; each rank is told in its own settings.
    switch = [] if target else ["train.deterministic=true"]
    with refusing_settings():
        run = load_checked(config, [*given, *switch], world_size=processes)
    if target:
        _be_a_rank(run, Path(target), steps=steps, noise=fault == "noise")
        return
    with tempfile.TemporaryDirectory(prefix="ghostvis-determinism-") as folder:
        for name, on in RUNS.items():
            argv = ["bench", "determinism", str(config), *given]
            argv += [f"train.deterministic={str(on).lower()}", f"log.output={folder}/run"]
            argv += ["--steps", str(steps), "--processes", str(processes)]
            argv += ["--fault", fault] if fault and name == "second" else []
            _launch(
                name,
                argv,
                processes=processes,
                timeout_s=timeout_s,
                folder=Path(folder),
                device="cuda" if run.train.device != "cpu" and has_cuda_device() else "cpu",
            )
        rows = _rows(Path(folder))
    conclude(rows, title=f"{steps} steps of {config}", as_json=as_json)


def _launch(
    name: str, argv: list[str], *, processes: int, timeout_s: float, folder: Path, device: str
) -> None:
    """One of the three runs, to its end."""
    try:
        run_ranks(
            ["-m", "ghostvis_mega", *argv],
            ranks=processes,
            timeout_s=timeout_s,
            folder=folder / name,
            environment={FILE_VARIABLE: str(folder / f"{name}.json"), **device_environment(device)},
            first_output=2,
        )
    except (RankError, RankHang) as failure:
        typer.echo(f"the {name} run: {failure}", err=True)
        raise typer.Exit(1) from None


def _rows(folder: Path) -> list[dict]:
    from ghostvis_mega.perf.determinism import compare_bits

    return compare_bits(*(json.loads((folder / f"{name}.json").read_text()) for name in RUNS))


def _be_a_rank(run: RunConfig, target: Path, *, steps: int, noise: bool) -> None:
    from ghostvis_mega.perf.determinism import run_bits
    from ghostvis_mega.session import local_device, open_world

    with open_world(run, device=local_device(run)) as world:
        bits = run_bits(
            run,
            world.groups,
            device=world.device,
            steps=steps,
            progress=world.watchdog.alive,
            noise=noise,
        )
        if world.groups.rank == 0:
            target.write_text(json.dumps(bits))
