"""Every random generator goes on where it was."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import safe_open

from ghostvis_mega.checkpoint.random_state import capture_random_state, restore_random_state
from ghostvis_mega.checkpoint.tensors import write_tensors

pytestmark = pytest.mark.durability


def through_a_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, texts = capture_random_state()
    write_tensors(path, tensors, metadata=texts)
    with safe_open(path, framework="pt") as file:
        keys = file.keys()
        return {key: file.get_tensor(key) for key in keys}, file.metadata()


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        # The first of a pair; the second is kept for the next call.
        lambda: random.gauss(0.0, 1.0),
        np.random.random,
        np.random.normal,
        lambda: float(torch.rand(())),
    ],
)
def test_the_next_number_is_the_same(tmp_path: Path, draw: Callable[[], float]):
    draw()
    saved = through_a_file(tmp_path / "random.safetensors")
    first = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != first
    restore_random_state(*saved)
    assert [draw() for _ in range(3)] == first


def test_megatrons_own_states_are_among_them(tmp_path: Path):
    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()
    tracker.set_states({"model-parallel-rng": torch.get_rng_state()})
    try:
        saved = through_a_file(tmp_path / "random.safetensors")
        expected = tracker.get_states()["model-parallel-rng"].clone()
        tracker.set_states({})
        restore_random_state(*saved)
        assert torch.equal(tracker.get_states()["model-parallel-rng"], expected)
    finally:
        tracker.set_states(before)
