"""Short drills: every point of a save, random kills, power cuts and damage; and that they can fail.

In processes of their own: the drills fork, and want a parent without threads.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.launch import ROOT

pytestmark = [pytest.mark.world_size(2), pytest.mark.durability]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def drill(*args: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, rows by name, and what was said."""
    return command("drill", *args)


def command(*args: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """As `drill`, of any command."""
    done = subprocess.run(
        [sys.executable, "-m", "ghostvis_mega", *args, "--json"],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)}, done.stderr


def test_no_kill_loses_more_than_the_save_under_way():
    code, rows, said = drill("crash", "--random-kills", "200")
    assert code == 0, said
    assert rows["named points"]["value"] >= 40
    assert rows["kills at points"]["value"] >= 200
    assert rows["power cuts"]["value"] >= 150
    assert rows["full disks"]["value"] >= 30
    assert rows["random kills"]["value"] == 200
    assert all(row["value"] == 0 for name, row in rows.items() if name.startswith("losses"))


@pytest.mark.parametrize(
    ("fault", "kills", "says"),
    [
        ("prune-first", True, "no checkpoint is left"),
        ("manifest-first", True, "it has its final name"),
        # SIGKILL leaves the system's memory of the files; only a power cut shows this one.
        ("no-fsync", False, "power cut"),
    ],
)
def test_a_save_in_the_wrong_order_is_found(fault: str, kills: bool, says: str):
    code, rows, said = drill("crash", "--random-kills", "0", "--fault", fault)
    assert code == 1
    assert (rows["losses after kills at points"]["value"] > 0) == kills
    assert rows["losses after power cuts"]["value"] > 0
    assert says in said


def test_all_damage_is_found_and_its_file_named():
    code, rows, said = drill("corrupt", "--trials", "550")
    assert code == 0, said
    assert rows["damaged checkpoints"]["value"] >= 500
    kinds = {
        name.split(", ")[1] for name in rows if ", " in name and "trials" in rows[name]["unit"]
    }
    assert kinds >= {"llm", "vision", "optimizer", "random", "manifest.json"}


def test_sizes_alone_would_not_find_it():
    code, rows, _ = drill("corrupt", "--trials", "100", "--unverified")
    assert code == 1
    unnoticed = rows["unnoticed, or not named, or no fallback"]["value"]
    flips = sum(
        row["value"]
        for name, row in rows.items()
        if name.startswith("bit flipped") and "manifest" not in name
    )
    assert flips <= unnoticed < rows["damaged checkpoints"]["value"]
