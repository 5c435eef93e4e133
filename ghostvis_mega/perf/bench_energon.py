"""megatron-energon's speed on our pictures and tars, measured in an environment of its own."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.energon import ENERGON_VERSION, export_energon
from ghostvis_mega.perf.energon_install import REQUIREMENT, install_energon
from ghostvis_mega.utils.errors import GhostVisError

WORKER = Path(__file__).with_name("energon_worker.py")
_VERSION = "from importlib.metadata import version; print(version('megatron-energon'))"
_TIMEOUT_S = 600


class Energon(NamedTuple):
    """Where megatron-energon is, or why it is not: then `python` is None."""

    python: str | None
    version: str
    problem: str = ""


def find_energon(python: str | None = None) -> Energon:
    """The megatron-energon of `python`, or of a private environment that is made if need be.

    Raises:
        GhostVisError: `python` is given and has none.
    """
    if python is not None:
        return Energon(python, energon_version(python))
    try:
        python = install_energon()
        return Energon(python, energon_version(python))
    except GhostVisError as error:
        return Energon(None, ENERGON_VERSION, str(error))


class EnergonSpeed(NamedTuple):
    """Rates a second; by CPU time for one process, by wall time for several worker processes."""

    images_per_cpu_s: float
    images_per_wall_s: float
    prepared_per_cpu_s: float


def energon_version(python: str) -> str:
    """Version of the megatron-energon that the interpreter `python` has.

    Raises:
        GhostVisError: there is no such interpreter, or it has no megatron-energon.
    """
    if shutil.which(python) is None:
        raise GhostVisError(
            f"--energon {python}: there is no such program; without --energon, {REQUIREMENT} is "
            "installed into an environment of its own"
        )
    done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=False)
    if "PackageNotFoundError" in done.stderr:
        raise GhostVisError(
            f"--energon {python}: this interpreter has no megatron-energon; without --energon, "
            f"{REQUIREMENT} is installed into an environment of its own"
        )
    if done.returncode != 0:
        raise GhostVisError(
            f"--energon {python} ended with {done.returncode} when asked for its "
            f"megatron-energon: {_last_line(done.stderr)}"
        )
    return done.stdout.strip()


def measure_energon(
    python: str, *, dataset: Path, tar: Path, side: int, batch_size: int, workers: int
) -> EnergonSpeed:
    """Export `dataset`, one JPEG a sample, and time energon's loader on it and its index of `tar`.

    Args:
        python: interpreter that has megatron-energon.
        tar: is copied, since energon writes beside it.
        side: of the square pictures in pixels.
        workers: processes of the measurement by wall time.

    Raises:
        GhostVisError: the measurement failed, or did not read every picture.
    """
    with tempfile.TemporaryDirectory(dir=dataset.parent) as name, Dataset.open(dataset) as opened:
        export, tars = Path(name) / "export", Path(name) / "tars"
        export_energon(opened, export, split="val")
        tars.mkdir()
        shutil.copyfile(tar, tars / tar.name)
        sizes = [str(side), str(batch_size), str(workers)]
        command = [python, str(WORKER), str(export), str(tars), *sizes]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
                env=_environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise GhostVisError(f"energon's measurement took over {_TIMEOUT_S} s") from error
        pictures = opened.num_samples
    if done.returncode != 0:
        raise GhostVisError(
            f"energon's measurement ended with {done.returncode}: {_last_line(done.stderr)}"
        )
    found = json.loads(_last_line(done.stdout))
    one, several, prepared = found["one_process"], found["workers"], found["prepare"]
    for read in (one["images"], several["images"]):
        if read != pictures:
            raise GhostVisError(f"energon read {read} pictures of {pictures}: no fair comparison")
    return EnergonSpeed(
        images_per_cpu_s=pictures / one["cpu_s"],
        images_per_wall_s=pictures / several["wall_s"],
        prepared_per_cpu_s=prepared["samples"] / prepared["cpu_s"],
    )


def _environment() -> dict[str, str]:
    """Of the worker: no search paths of ours, and not the folder of its file, whose names could
    hide those of the standard library."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**environment, "PYTHONSAFEPATH": "1"}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "(no output)"
