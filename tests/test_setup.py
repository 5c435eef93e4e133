"""The package's metadata, and what the Makefile does on a machine that lacks what it needs."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import ghostvis_mega

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that setup.py gives to setuptools."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", seen.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    return seen


def test_version_and_python(metadata: dict[str, Any]) -> None:
    assert metadata["version"] == ghostvis_mega.__version__
    assert Version(metadata["version"])
    supported = SpecifierSet(metadata["python_requires"])
    assert "3.12.0" in supported
    assert "3.11.9" not in supported
    pinned = (ROOT / ".python-version").read_text().strip()
    assert pinned + ".0" in supported


def test_extras_and_requirements_parse(metadata: dict[str, Any]) -> None:
    extras = metadata["extras_require"]
    assert set(extras) == {"gpu", "wandb", "tensorboard", "data", "gguf", "demo", "dev"}
    required = {Requirement(line).name: Requirement(line) for line in metadata["install_requires"]}
    for group in extras.values():
        assert all(Requirement(line).name for line in group)
    for name in ("torch", "megatron-core", "deepspeed", "transformers", "pydantic"):
        assert name in required
    # Its internals are replaced on a CPU: another minor release must not slip in.
    assert "0.19.2" in required["megatron-core"].specifier
    assert "0.20.0" not in required["megatron-core"].specifier


def test_installed_versions_are_allowed(metadata: dict[str, Any]) -> None:
    from importlib.metadata import version

    for line in metadata["install_requires"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), line


def test_every_package_is_shipped(metadata: dict[str, Any]) -> None:
    """A folder with modules but without __init__.py would be missing from a wheel."""
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("ghostvis_mega", "tools")
        for path in (ROOT / top).rglob("*.py")
    }
    assert folders == set(metadata["packages"])


def test_console_script_exists(metadata: dict[str, Any]) -> None:
    (script,) = metadata["entry_points"]["console_scripts"]
    name, target = script.split("=")
    module, function = target.split(":")
    assert name == "ghostvis"
    assert callable(getattr(importlib.import_module(module), function))


def test_no_registry_host_in_the_set_up() -> None:
    for name in ("Makefile", "setup.py", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--index-url|--find-links", text), name


def test_ci_runs_make_test_and_nothing_else() -> None:
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    commands = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    assert commands == ['exec make -C "$(dirname "$0")/.." test']


def test_package_data_matches_files_that_exist(metadata: dict[str, Any]) -> None:
    package = ROOT / "ghostvis_mega"
    shipped = {
        path
        for pattern in metadata["package_data"]["ghostvis_mega"]
        for path in package.glob(pattern)
    }
    assert package / "train" / "report" / "style.css" in shipped
    assert package / "train" / "report" / "hover.js" in shipped


def test_every_marker_in_use_is_declared() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--strict-markers" in options["addopts"]
    assert options["filterwarnings"][0] == "error"
    declared = {line.split(":")[0].split("(")[0] for line in options["markers"]}
    assert declared == {"durability", "gpu", "slow", "world_size"}


def fake_python(folder: Path, name: str, *, version: str, has_venv: bool = True) -> None:
    """An executable that answers the Makefile's probe as a Python of that version would."""
    script = f"#!/bin/sh\necho {version}\nexit {0 if has_venv else 1}\n"
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """A folder that holds make's and the recipes' tools, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "sh", "make"):
        found = shutil.which(tool)
        assert found is not None, tool
        (folder / tool).symlink_to(found)
    return folder


def find_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make find-python` with that folder as the whole PATH and no pyenv."""
    return subprocess.run(
        [str(folder / "make"), "find-python", *arguments],
        cwd=ROOT,
        env={"PATH": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of ours; make adds its own, which begins with `make:`."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_old_python_is_refused_in_one_sentence(bare_machine: Path) -> None:
    fake_python(bare_machine, "python3", version="3.11.9")
    result = find_python(bare_machine)
    assert result.returncode == 2
    line = error_line(result)
    assert line.startswith("error: no Python >= 3.12 found")
    assert "python3 is 3.11.9" in line
    assert "python3.12 not found" in line
    assert "make env PYTHON=" in line
    assert result.stdout == ""


def test_python_2_and_a_missing_venv_module_are_refused(bare_machine: Path) -> None:
    fake_python(bare_machine, "python", version="2.7.18")
    fake_python(bare_machine, "python3.12", version="3.12.4", has_venv=False)
    result = find_python(bare_machine)
    assert result.returncode == 2
    line = error_line(result)
    assert "python is 2.7.18" in line
    assert "python3.12 cannot make environments" in line


def test_new_python_is_found_and_the_pinned_one_comes_first(bare_machine: Path) -> None:
    fake_python(bare_machine, "python3", version="3.13.1")
    result = find_python(bare_machine)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(bare_machine / "python3")
    fake_python(bare_machine, "python3.12", version="3.12.4")
    assert find_python(bare_machine).stdout.strip() == str(bare_machine / "python3.12")


def test_a_named_python_is_the_only_candidate(bare_machine: Path) -> None:
    fake_python(bare_machine, "python3.12", version="3.12.4")
    fake_python(bare_machine, "mine", version="3.9.0")
    result = find_python(bare_machine, f"PYTHON={bare_machine / 'mine'}")
    assert result.returncode == 2
    assert f"{bare_machine / 'mine'} is 3.9.0" in error_line(result)


def test_a_pyenv_outside_of_path_is_found(bare_machine: Path) -> None:
    versions = bare_machine / ".pyenv" / "versions" / "3.12.1" / "bin"
    versions.mkdir(parents=True)
    fake_python(versions, "python", version="3.12.1")
    result = find_python(bare_machine)
    assert result.stdout.strip() == str(versions / "python"), result.stderr
