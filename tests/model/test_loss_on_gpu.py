"""A GPU: the fused kernels and the products with fp32 sums against fp64 on the CPU."""

import pytest
import torch
from torch import nn

from ghostvis_mega.model.loss import LossTargets, default_kernels, head_loss
from ghostvis_mega.model.loss_kernels import LossKernels, TorchLossKernels
from tests.model.loss_cases import SCALE, TOKENS, VOCABULARY, Case, Outcome, distance, make_case
from tests.model.loss_cases import unfused as plain_outcome

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
BARS = {torch.float32: 5e-6, torch.bfloat16: 6e-3}


class Alone:
    """A group of one process, in which nothing is sent."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def fused(case: Case, *, kernels: LossKernels | None = None, rows: int = 256) -> Outcome:
    hidden_RH = case.hidden_RH.to(GPU).requires_grad_()
    weight_VH = nn.Parameter(case.weight_VH.to(GPU))
    if weight_VH.dtype == torch.bfloat16:
        weight_VH.grad_dtype = torch.float32
    targets = LossTargets(
        case.labels_R.to(GPU),
        case.weights_R.to(GPU),
        tokens=TOKENS,
        chunk_bytes=rows * VOCABULARY * weight_VH.element_size(),
        kernels=kernels,
    )
    loss = head_loss(hidden_RH, weight_VH, targets, group=Alone())
    (loss * SCALE).backward()
    assert weight_VH.grad.dtype == torch.float32
    return Outcome(loss.detach(), hidden_RH.grad, weight_VH.grad)


def parts(outcome: Outcome) -> list[torch.Tensor]:
    return [part.cpu() for part in (outcome.loss, outcome.hidden, outcome.weight)]


def worst(one: Outcome, other: Outcome) -> float:
    return max(distance(a, b) for a, b in zip(parts(one), parts(other), strict=True))


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("rows", [256, 300, 1000])
def test_loss_and_gradients_are_exact(dtype: torch.dtype, rows: int) -> None:
    case = make_case(rows=600, hidden=128, dtype=dtype)
    truth = plain_outcome(case, dtype=torch.float64)
    assert worst(fused(case, rows=rows), truth) <= BARS[dtype]
    case.labels_R += 1
    assert worst(fused(case, rows=rows), truth) > 0.1


@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_the_fused_kernels_are_pytorchs(dtype: torch.dtype) -> None:
    assert type(default_kernels(GPU)).__name__ == "TritonLossKernels"
    case = make_case(rows=600, hidden=128, dtype=dtype)
    ours, theirs = fused(case), fused(case, kernels=TorchLossKernels())
    assert worst(ours, theirs) <= (1e-6 if dtype == torch.float32 else 1e-3)


def test_equal_input_gives_equal_bits() -> None:
    case = make_case(rows=600, hidden=128, dtype=torch.bfloat16)
    first, second = fused(case), fused(case)
    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))
