"""`ghostvis drill resume`: N steps, SIGKILL, N steps; against 2 N steps at one go."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ghostvis_mega.cli.check import DeviceName
from ghostvis_mega.cli.output import (
    EXIT_WRONG_SETTINGS,
    AsJson,
    conclude,
    refusing_settings,
    scratch,
)
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.figures import Figure, at_most, measured
from ghostvis_mega.utils.launch import device_environment
from ghostvis_mega.utils.logging import setup_logging

DRILL_RESUME_HELP = """Kill a run after N steps, start it again, compare with a run of 2 N steps.

\b
Examples (a tiny model on two CPU processes, two layouts; a real one on two GPUs):
  python -m ghostvis_mega drill resume --config examples/configs/vlm_tiny_easyvqa.yaml \\
    --case "dp: data.num_workers=2" --case "tp: parallel.tensor=2"
  python -m ghostvis_mega drill resume --config examples/configs/vlm_1_5b_easyvqa.yaml \\
    --device cuda --out /data/drill --case "tp: parallel.tensor=2 data.augment=true"

\b
All ranks are killed with SIGKILL once the checkpoint after N steps is there, in the midst of later
steps. The checkpoints after 2 N steps must hold the same bits (weights, masters, moments and
generators), and all steps must have the same losses, norms and data. Both runs are deterministic
(train.deterministic); equal bits need it. --fault forgets one moment of the optimizer in between,
and must end with 1. The files of one run are deleted before the next begins.
Exit code: 0 not one bit differs, 1 otherwise, 2 wrong settings.
"""

_COMPARED = ("loss", "grad_norm", "tokens", "trained_tokens", "images", "samples", "skipped")


@dataclass(frozen=True)
class Job:
    """One case of the drill."""

    config: Path
    settings: tuple[str, ...]
    folder: Path
    processes: int
    steps: int
    """N."""
    timeout_s: float
    """Of each start."""

    def check(self) -> None:
        """End with one sentence where the run cannot be, before any rank is started."""
        with refusing_settings():
            overrides = self.overrides("whole", save_every=0)
            load_checked(self.config, overrides, world_size=self.processes)

    def checkpoint(self, run: str, steps: int) -> Path:
        """Of one of the two runs."""
        return self.folder / run / "checkpoints" / f"step-{steps:08d}"

    def overrides(self, run: str, *, save_every: int) -> list[str]:
        """What the drill sets beside the case's own settings."""
        return [
            "optim.warmup_steps=1",  # of the few steps; a case may say otherwise
            *self.settings,
            f"train.steps={2 * self.steps}",
            "train.deterministic=true",
            f"checkpoint.save_every={save_every}",
            "checkpoint.save_at_end=true",
            "checkpoint.keep=1",
            "checkpoint.export_hf=none",
            "log.preview_steps=[]",
            "log.evaluate=false",
            f"log.output={self.folder / run}",
        ]


def drill_resume(
    config: Annotated[Path, typer.Option(help="YAML file of a run.", show_default=False)],
    case: Annotated[
        list[str] | None, typer.Option(help="'NAME: section.key=value ...'; may be repeated.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="N.")] = 2,
    device: Annotated[DeviceName, typer.Option(help="Where to train.")] = DeviceName.cpu,
    out: Annotated[Path | None, typer.Option(help="For all files; a temporary folder.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="Of each start.")] = 300.0,
    fault: Annotated[bool, typer.Option("--fault", help="Break it on purpose.")] = False,
    as_json: AsJson = False,
) -> None:
    """All cases, one after the other."""
    setup_logging(rank=0)
    if device == DeviceName.cpu:
        os.environ |= device_environment(device)
        # Imported once and forked. A process that has seen a GPU cannot be forked, so with GPUs
        # each rank imports for itself.
        import ghostvis_mega.session  # noqa: F401
    rows: list[Figure] = []
    with scratch("drill", out) as folder:
        for number, text in enumerate(case or ["as it is:"]):
            name, colon, settings = text.partition(":")
            if not colon:
                typer.echo(f"error: --case {text!r} has no name before a colon", err=True)
                raise typer.Exit(EXIT_WRONG_SETTINGS)
            job = Job(
                config=config,
                settings=tuple(settings.split()),
                folder=folder / str(number),
                processes=processes,
                steps=steps,
                timeout_s=timeout_s,
            )
            job.check()
            job.folder.mkdir()
            rows += [{**row, "name": f"{name}: {row['name']}"} for row in _drill(job, fault=fault)]
    conclude(rows, title="N + kill + N against 2 N", as_json=as_json)


def _drill(job: Job, *, fault: bool) -> list[Figure]:
    from ghostvis_mega.checkpoint.manifest import read_manifest
    from ghostvis_mega.utils.forks import run_forked

    whole = partial(_train, job.config, job.overrides("whole", save_every=0))
    run_forked(whole, ranks=job.processes, folder=job.folder, timeout_s=job.timeout_s)
    expected = read_manifest(job.checkpoint("whole", 2 * job.steps))
    for name in expected.files:
        (job.checkpoint("whole", 2 * job.steps) / name).unlink()
    killed = partial(_train, job.config, job.overrides("killed", save_every=job.steps))
    done, saved = _kill_after_save(job, killed)
    if fault:
        forget_moment(job.checkpoint("killed", job.steps))
    run_forked(killed, ranks=job.processes, folder=job.folder, timeout_s=job.timeout_s)
    found = read_manifest(job.checkpoint("killed", 2 * job.steps))
    names = expected.files.keys() | found.files.keys()
    files = [
        name
        for name in sorted(names)
        if name not in expected.files
        or name not in found.files
        or expected.files[name].sha256 != found.files[name].sha256
    ]
    for name in files:
        typer.echo(f"{job.folder}: {name} differs", err=True)
    rows = [_metrics(job.folder / run) for run in ("whole", "killed")]
    lines = sum(one != other for one, other in zip(*rows, strict=False))
    lines += abs(len(rows[0]) - 2 * job.steps) + abs(len(rows[1]) - 2 * job.steps)
    states = (expected.extra, expected.optimizer_steps), (found.extra, found.optimizer_steps)
    return [
        measured("steps done when it was killed", done, "steps"),
        at_most("steps saved when it was killed", saved, "steps", job.steps),
        measured("files compared", len(names), "files"),
        at_most("files with other bits", len(files), "files", 0),
        at_most("steps with another loss, norm or batch", lines, "steps", 0),
        at_most("other counts, guards or data position", int(states[0] != states[1]), "", 0),
    ]


def _kill_after_save(job: Job, action: Any) -> tuple[int, int]:
    """Start, and kill all ranks when the checkpoint after N steps has its name; the steps that the
    run had reported by then, and those that were saved.

    Raises:
        RuntimeError: The ranks ended before, or took too long.
    """
    from ghostvis_mega.utils.forks import ForkedRanks

    with ForkedRanks(action, ranks=job.processes, folder=job.folder) as forked:
        end = time.monotonic() + job.timeout_s
        while not job.checkpoint("killed", job.steps).is_dir():
            if forked.poll() or time.monotonic() > end:
                raise RuntimeError(f"no checkpoint to kill at:\n{forked.output(0)[-4000:]}")
            time.sleep(0.002)
        forked.kill()
    # Steps may all be done where writing a checkpoint takes longer than they; what counts is that
    # the second start has to do them again.
    saved = max(number for number in range(2 * job.steps + 1) if _saved(job, number))
    return len(_metrics(job.folder / "killed")), saved


def _saved(job: Job, steps: int) -> bool:
    return job.checkpoint("killed", steps).is_dir()


def _train(config: Path, overrides: Sequence[str], rank: int) -> str:
    """One rank of a run."""
    setup_logging(rank=rank)
    run = load_checked(config, overrides, world_size=int(os.environ["WORLD_SIZE"]))
    from ghostvis_mega.session import Training, local_device, open_world

    with open_world(run, device=local_device(run)) as world:
        Training(run, world).execute()
    return "finished"


def _metrics(output: Path) -> list[tuple[Any, ...]]:
    """What must be equal of each step."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["step"], *(row[key] for key in _COMPARED)) for row in rows]


def forget_moment(checkpoint: Path) -> None:
    """Set one moment of one parameter to zero, in a file and manifest that verify."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    from ghostvis_mega.checkpoint.manifest import read_manifest, write_manifest
    from ghostvis_mega.checkpoint.tensors import write_tensors

    document = read_manifest(checkpoint).model_dump(mode="json", by_alias=True)
    name = next(name for name, info in document["files"].items() if info["kind"] == "optimizer")
    tensors = load_file(checkpoint / name)
    with safe_open(checkpoint / name, framework="pt") as file:
        metadata = file.metadata() or {}
    key = next(key for key in sorted(tensors) if key.startswith("exp_avg/") and tensors[key].any())
    tensors[key] = torch.zeros_like(tensors[key])
    (checkpoint / name).unlink()
    size, digest = write_tensors(checkpoint / name, list(tensors.items()), metadata=metadata)
    document["files"][name] |= {"bytes": size, "sha256": digest}
    write_manifest(checkpoint, document)
