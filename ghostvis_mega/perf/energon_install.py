"""An environment with megatron-energon, made once and reused: the bench compares with the real one.

It sees the packages of the Python that runs the bench, so that torch and numpy are not installed
again, and nothing is ever installed into that Python.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ghostvis_mega.data.export.energon import ENERGON_VERSION
from ghostvis_mega.utils.errors import GhostVisError

log = logging.getLogger(__name__)

REQUIREMENT = f"megatron-energon=={ENERGON_VERSION}"
_PARENT = "packages-of-the-bench.pth"
_TIMEOUT_S = 900
_ADVICE = (
    "with access to a package index, run again; or name a Python that has it with --energon; or "
    "leave it out with --no-energon"
)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/ghostvis, by default ~/.cache/ghostvis."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ghostvis"


def install_energon(*, base: str = sys.executable) -> str:
    """Python of the private environment; made at the first call, with pip and its settings.

    Args:
        base: Python to make it from.

    Raises:
        GhostVisError: it could not be made; nothing of it is left.
    """
    if (python := installed_energon()) is not None:
        return python
    _make(_place(), base=base)
    return str(_python(_place()))


def installed_energon() -> str | None:
    """Python of the private environment that an earlier run made, if there is one."""
    python = _python(_place())
    return str(python) if python.exists() else None


def _place() -> Path:
    """An environment sees the packages of one Python; another Python gets another."""
    identity = hashlib.sha256("\n".join(_packages()).encode()).hexdigest()[:12]
    return cache_folder() / f"energon-{ENERGON_VERSION}-{identity}"


def _packages() -> list[str]:
    """Where packages lie; by links a folder has several names."""
    paths = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    return list(dict.fromkeys(os.path.realpath(path) for path in paths))


def _python(place: Path) -> Path:
    return Path(_path(place, "scripts")) / "python"


def _path(place: Path, name: str) -> str:
    return sysconfig.get_path(name, "venv", {"base": str(place), "platbase": str(place)})


def _make(place: Path, *, base: str) -> None:
    """Under a name of this process first, so that what is there is whole."""
    fresh = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    log.info("installing %s once, into %s", REQUIREMENT, place)
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        _run([base, "-m", "venv", str(fresh)])
        Path(_path(fresh, "purelib"), _PARENT).write_text("\n".join(_packages()) + "\n")
        _run([str(_python(fresh)), "-m", "pip", "install", "--quiet", "--no-input", REQUIREMENT])
        if not _python(place).exists():  # another process may have been quicker
            shutil.rmtree(place, ignore_errors=True)  # its Python is gone, if it is there at all
            os.replace(fresh, place)
    except OSError as error:
        raise GhostVisError(f"{REQUIREMENT} could not be installed ({error}): {_ADVICE}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _run(command: list[str]) -> None:
    """Run without the caller's search paths, which are not the environment's."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_USER", "PIP_PREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise GhostVisError(
            f"{REQUIREMENT} could not be installed in {_TIMEOUT_S} s: {_ADVICE}"
        ) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise GhostVisError(f"{REQUIREMENT} could not be installed ({errors[-1]}): {_ADVICE}")
