"""The compiled tower on a GPU: no further from the truth than transformers' modules, repeatable."""

import copy
from collections.abc import Iterator

import pytest
import torch

from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.model.vision_layer import FusedLayers
from tests.model.test_vision_layer import distance, encoder, outcome

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


def on_gpu(made: VisionEncoder, dtype: torch.dtype) -> VisionEncoder:
    """A copy with weights rounded to BF16, then of `dtype`."""
    moved = copy.deepcopy(made).to(GPU)
    for part in (moved.tower, moved.projector):
        part.to(torch.bfloat16).to(dtype)
    return moved


def fused(kind: str) -> VisionEncoder:
    """The same weights, and compiled layers."""
    made = on_gpu(encoder(kind), torch.bfloat16)
    made.fused = FusedLayers(compiled=True)
    return made


def as_fp32(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU."""
    return {name: value.float().cpu() for name, value in found.items()}


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As `train.deterministic` has it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_compiled_layers_round_no_more_than_transformers(kind: str) -> None:
    truth = as_fp32(outcome(on_gpu(encoder(kind), torch.float32), 5))
    plain = distance(as_fp32(outcome(on_gpu(encoder(kind), torch.bfloat16), 5)), truth)
    compiled = fused(kind)
    for images in (3, 5):
        mine = as_fp32(outcome(compiled, images))
    assert 1e-4 < plain < 0.1
    assert distance(mine, truth) <= 1.5 * plain


@pytest.mark.usefixtures("deterministic")
def test_equal_steps_give_equal_bits() -> None:
    first, again = (outcome(fused("siglip"), 5) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
