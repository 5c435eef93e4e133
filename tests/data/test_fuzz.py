"""Damaged pictures and rows by the hundred: none crashes, hangs, eats memory or disappears.

The whole (10,000 pictures, 1,000 files): python -m pytest -m slow tests/data/test_fuzz.py
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.fuzzing import fuzzed_lines, fuzzed_picture, originals

ROOT = Path(__file__).resolve().parents[2]
MOST_MEMORY_MIB = 700
"""Pillow holds 64 Mi pixels of four bytes at most, and a second copy while it converts."""


def _feed(kind: str, count: int, folder: Path, *, timeout: float) -> dict[str, int]:
    """Reasons of rejection, and how many were stored; a crash or a hang fails here."""
    command = [sys.executable, "-m", "tests.data.fuzzing", kind, str(count), str(folder / "fuzz")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    logging.getLogger(__name__).info("%s", report)
    assert report["grown_mib"] < MOST_MEMORY_MIB
    return report["reasons"]


def _images_are_judged(reasons: dict[str, int]) -> None:
    """The damage is of many kinds, and some of it does no harm."""
    assert {"stored", "not_an_image", "broken", "truncated", "too_large"} <= set(reasons)


def _rows_are_judged(reasons: dict[str, int]) -> None:
    assert {"stored", "bad_json", "bad_row", "bad_turn"} <= set(reasons)


def test_500_damaged_pictures(tmp_path: Path) -> None:
    _images_are_judged(_feed("images", 500, tmp_path, timeout=120))


def test_50_damaged_files(tmp_path: Path) -> None:
    _rows_are_judged(_feed("rows", 50, tmp_path, timeout=120))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_10000_damaged_pictures(tmp_path: Path) -> None:
    _images_are_judged(_feed("images", 10_000, tmp_path, timeout=900))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_1000_damaged_files(tmp_path: Path) -> None:
    _rows_are_judged(_feed("rows", 1_000, tmp_path, timeout=900))


def test_the_supply_is_the_same_every_time_and_damaged() -> None:
    sources = originals()
    pictures = [fuzzed_picture(number, sources) for number in range(60)]
    assert pictures == [fuzzed_picture(number, sources) for number in range(60)]
    assert len(set(pictures) - set(sources)) > 50
    assert fuzzed_lines(3) == fuzzed_lines(3) != fuzzed_lines(4)
