"""The tower on Transformer Engine's kernels: no further from the truth than PyTorch's operations,
repeatable."""

import copy
from collections.abc import Iterator

import pytest
import torch

from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.model.vision_kernels import EngineKernels
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
    """The same weights, and Transformer Engine's kernels."""
    made = on_gpu(encoder(kind), torch.bfloat16)
    made.fused = FusedLayers(EngineKernels())
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
@pytest.mark.parametrize(("images", "bar"), [(5, 1.5), (1, 3.0)])
def test_fused_layers_round_no_more_than_plain_ones(kind: str, images: int, bar: float) -> None:
    """The worst parameter's rounding in a single picture is mostly chance."""
    mine = as_fp32(outcome(fused(kind), images))
    truth = as_fp32(outcome(on_gpu(encoder(kind), torch.float32), images))
    plain = distance(as_fp32(outcome(on_gpu(encoder(kind), torch.bfloat16), images)), truth)
    assert 1e-4 < plain < 0.1
    assert distance(mine, truth) <= bar * plain


def test_sums_over_micro_batches_are_kept_in_fp32() -> None:
    made = fused("siglip")
    truth = as_fp32(outcome(made))
    for parameter in made.parameters():
        parameter.grad = None
        parameter.grad_dtype = torch.float32
        parameter.grad = parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    made.zero_grad = lambda: None
    outcome(made)
    twice = as_fp32(outcome(made))
    half = {name: value / 2 for name, value in twice.items() if name in truth}
    assert distance(half | {"embeddings": truth["embeddings"]}, truth) <= 1e-2


@pytest.mark.usefixtures("deterministic")
def test_equal_steps_give_equal_bits() -> None:
    first, again = (outcome(fused("siglip"), 5) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
