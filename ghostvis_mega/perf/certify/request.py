"""What to certify, as plain values that travel to the ranks in a file. Needs no torch."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ghostvis_mega.perf.certify.cpu_layouts import cpu_layouts
from ghostvis_mega.perf.certify.faults import FAULTS, Fault
from ghostvis_mega.perf.certify.gpu_faults import GPU_FAULTS
from ghostvis_mega.perf.certify.gpu_layouts import LAYOUTS as GPU_LAYOUTS
from ghostvis_mega.perf.certify.layout import Layout
from ghostvis_mega.utils.errors import ConfigError

SETS: dict[str, Callable[[], tuple[Layout, ...]]] = {
    "cpu": cpu_layouts,
    "gpu": lambda: GPU_LAYOUTS,
}
"""Sets that come with the program."""
PLANTED: dict[str, Sequence[Fault]] = {"cpu": FAULTS, "gpu": GPU_FAULTS}
"""Faults of each."""


@dataclass(frozen=True)
class Entry:
    """One layout, or one planted fault."""

    name: str
    ranks: int
    overrides: tuple[str, ...] = ()
    """Of a layout of somebody's own run, `section.key=value` each."""
    planted: str = ""
    """Of a fault: key of `PLANTED`."""

    @property
    def fault(self) -> Fault | None:
        """The fault of this name, where it is one."""
        if not self.planted:
            return None
        return next(fault for fault in PLANTED[self.planted] if fault.name == self.name)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One launch."""

    set: str
    """Key of `SETS`; "own" with `config`."""
    entries: tuple[Entry, ...]
    steps: int
    folder: Path
    """Takes references, journal and errors; seen by all ranks."""
    config: Path | None = None
    """Of somebody's own run."""
    overrides: tuple[str, ...] = ()
    ranks_per_gpu: int = 1
    """Ranks that share a GPU; see `TrainConfig`."""
    align: int = 1
    """Of the packed samples of somebody's own run; see `own_settings`."""

    @property
    def ranks(self) -> int:
        """Processes of the launch."""
        return self.entries[0].ranks

    def write(self, path: Path) -> None:
        """Store as JSON."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def read(cls, path: Path) -> "Request":
        """Load what `write` stored."""
        given = json.loads(path.read_text())
        entries = tuple(
            Entry(**(entry | {"overrides": tuple(entry["overrides"])}))
            for entry in given["entries"]
        )
        config = Path(given["config"]) if given["config"] is not None else None
        return cls(
            set=given["set"],
            entries=entries,
            steps=given["steps"],
            folder=Path(given["folder"]),
            config=config,
            overrides=tuple(given["overrides"]),
            ranks_per_gpu=given["ranks_per_gpu"],
            align=given["align"],
        )


def entries_of(name: str, *, faults: bool) -> list[Entry]:
    """Entries of a set that comes with the program."""
    entries = [Entry(layout.name, layout.ranks) for layout in SETS[name]()]
    if faults:
        entries += [Entry(f.name, f.layout.ranks, planted=name) for f in PLANTED[name]]
    return entries


def own_entries(path: Path, *, ranks: int) -> list[Entry]:
    """Layouts of a YAML file: a list `layouts` of `name` and `overrides`, and maybe `ranks`.

    Raises:
        ConfigError: With every problem of the file.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            [f"--layouts {path}: no such file. Use cpu, gpu, or a YAML file of layouts."]
        ) from None
    except OSError as error:
        raise ConfigError(
            [f"--layouts {path} cannot be read: {error.strerror}. Name a YAML file of layouts."]
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"--layouts {path} is not valid YAML: {error}"]) from None
    listed = given.get("layouts") if isinstance(given, dict) else None
    if not isinstance(listed, list) or not listed or set(given) != {"layouts"}:
        raise ConfigError(
            [f"--layouts {path} must hold one key, layouts: a list of name and overrides."]
        )
    problems: list[str] = []
    entries = [
        _own_entry(item, f"{path}: layouts[{i}]", ranks, problems) for i, item in enumerate(listed)
    ]
    names = [entry.name for entry in entries]
    problems += [
        f"{path}: two layouts have the name {name!r}. Give each its own."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(problems)
    return entries


def _own_entry(item: Any, where: str, ranks: int, problems: list[str]) -> Entry:
    if not isinstance(item, dict):
        problems.append(f"{where} is no mapping. Write `- name: ...` with `overrides: [...]`.")
        return Entry(where, ranks)
    for key in item.keys() - {"name", "overrides", "ranks"}:
        problems.append(f"{where} has the unknown key {key}. Use name, overrides and ranks.")
    name, wanted = item.get("name", where), item.get("ranks", ranks)
    overrides = item.get("overrides", [])
    if not isinstance(name, str) or not name.strip():
        problems.append(f"{where}.name={name!r} is no text. Give the layout a name.")
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        problems.append(f"{where}.ranks={wanted!r} is no number of processes. Use 1 or more.")
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        problems.append(f"{where}.overrides={overrides!r} is no list of section.key=value texts.")
        overrides = []
    return Entry(str(name), wanted, tuple(overrides))


def chosen(entries: Sequence[Entry], only: str | None) -> list[Entry]:
    """Entries whose name the regular expression finds.

    Raises:
        ConfigError: It is none, or finds nothing.
    """
    if only is None:
        return list(entries)
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ConfigError([f"--only {only!r} is no regular expression: {error}."]) from None
    found = [entry for entry in entries if pattern.search(entry.name)]
    if not found:
        raise ConfigError([f"--only {only!r} fits none of {len(entries)} names."])
    return found
