"""Damages a checkpoint in every way and looks whether a restarted run notices before it reads on.

The newest of two checkpoints is damaged: bits flipped, files cut short, grown, emptied, deleted and
swapped, of every kind of file. Each time verifying must name a file that was touched, and a run
that resumes by itself must fall back to the older checkpoint.
"""

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ghostvis_mega.checkpoint import reader as reader_module
from ghostvis_mega.checkpoint.drill_state import content_problem, drill_snapshot
from ghostvis_mega.checkpoint.folder import CheckpointFolder
from ghostvis_mega.checkpoint.manifest import MANIFEST_FILE, read_manifest, size_problem
from ghostvis_mega.checkpoint.reader import whole_damage
from ghostvis_mega.checkpoint.saving import write_checkpoint

_STEPS = (7, 8)
Damage = Callable[[Path, random.Random], list[str]]
"""Changes a checkpoint; returns the names of files of which one must be named."""


@dataclass
class Findings:
    """What a drill has seen."""

    trials: dict[str, int] = field(default_factory=dict)
    """By kind of damage and of file."""
    problems: list[str] = field(default_factory=list)


def flip_bit(path: Path, draw: random.Random) -> list[str]:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return [path.name]


def cut_short(path: Path, draw: random.Random) -> list[str]:
    os.truncate(path, draw.randrange(path.stat().st_size))
    return [path.name]


def grow(path: Path, draw: random.Random) -> list[str]:
    with path.open("ab") as file:
        file.write(draw.randbytes(1 + draw.randrange(64)))
    return [path.name]


def zero_block(path: Path, draw: random.Random) -> list[str]:
    """As a disk gives back a block that it lost; the block holds more than zeros."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    end = min(len(data), at + 512)
    if not any(data[at:end]):
        at, end = 0, 8
    data[at:end] = bytes(end - at)
    path.write_bytes(data)
    return [path.name]


def delete(path: Path, draw: random.Random) -> list[str]:
    path.unlink()
    return [path.name]


def swap(path: Path, draw: random.Random) -> list[str]:
    """With another file of the checkpoint, of the same size where there is one."""
    others = sorted(other for other in path.parent.iterdir() if other != path)
    size = path.stat().st_size
    other = draw.choice([o for o in others if o.stat().st_size == size] or others)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return [path.name, other.name]


def of_other_step(path: Path, draw: random.Random) -> list[str]:
    """The file of the older checkpoint in the place of this one's."""
    older = path.parent.with_name(f"step-{_STEPS[0]:08d}") / path.name
    shutil.copyfile(older, path)
    # A manifest of another step also makes every other file the wrong one.
    names = [entry.name for entry in path.parent.iterdir()]
    return names if path.name == MANIFEST_FILE else [path.name]


DAMAGES: dict[str, Damage] = {
    "bit flipped": flip_bit,
    "cut short": cut_short,
    "grown": grow,
    "block of zeros": zero_block,
    "deleted": delete,
    "swapped": swap,
    "of another step": of_other_step,
}
_MORE = {"bit flipped": 4, "cut short": 2}
"""How many times as often as the others."""


def corrupt(work: Path, *, trials: int, seed: int, verify: bool = True) -> Findings:
    """Damage and look, at least `trials` times over all kinds of damage and of files.

    Args:
        work: Existing directory for all files.
        trials: Number of damaged checkpoints.
        seed: Of where the damage is done.
        verify: False compares sizes alone: damage must then go unnoticed.
    """
    logging.getLogger("ghostvis_mega.checkpoint").setLevel(logging.CRITICAL)
    findings, draw = Findings(), random.Random(seed)
    template = work / "template"
    for step in _STEPS:
        snapshot = drill_snapshot(step, rank=0, ranks=1)
        write_checkpoint(CheckpointFolder(template), snapshot, extra={}, keep=2, group=None)
    names = sorted(path.name for path in (template / f"step-{_STEPS[1]:08d}").iterdir())
    digest = reader_module.digest_problem
    if not verify:
        reader_module.digest_problem = lambda *args, **_: size_problem(*args)
    try:
        for damage, name in _plan(names, trials):
            folder = work / "checkpoints"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(template, folder)
            kind = f"{damage}, {name.split('-')[0]}"
            findings.trials[kind] = findings.trials.get(kind, 0) + 1
            found = list(_trial(folder, DAMAGES[damage], name, draw))
            findings.problems += [f"{kind}: {problem}" for problem in found]
    finally:
        reader_module.digest_problem = digest
    return findings


def _plan(names: list[str], trials: int) -> Iterator[tuple[str, str]]:
    """Kinds of damage and file names, all as often, but for the kinds that vary most."""
    once = [(kind, name) for kind in DAMAGES for name in names for _ in range(_MORE.get(kind, 1))]
    for _ in range(-(-trials // len(once))):
        yield from once


def _trial(folder: Path, damage: Damage, name: str, draw: random.Random) -> Iterator[str]:
    newest = folder / f"step-{_STEPS[1]:08d}"
    touched = damage(newest / name, draw)
    sentences = whole_damage(newest)
    if not sentences and _same_files(newest, folder.with_name("template") / newest.name):
        return  # the swapped files were equal
    named = [sentence for sentence in sentences if str(newest) in sentence]
    if not any(file in sentence for sentence in named for file in touched):
        yield f"{touched} changed, and what is said is {sentences}"
    checkpoints = CheckpointFolder(folder)
    found = checkpoints.newest()
    while found is not None and whole_damage(found):
        checkpoints.damaged.add(found.name)
        found = checkpoints.newest()
    if found is None or read_manifest(found).step != _STEPS[0]:
        yield f"the run would go on from {found}"
    elif problem := content_problem(found):
        yield problem


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in other.iterdir())
    return names == sorted(path.name for path in one.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )
