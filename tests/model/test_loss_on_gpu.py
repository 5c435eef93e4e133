"""A GPU: the fused kernels and the products with fp32 sums against fp64 on the CPU."""

import pytest
import torch
from torch import nn

from ghostvis_mega.model.embedding import add_rows_
from ghostvis_mega.model.loss import LossTargets, default_kernels, head_loss
from ghostvis_mega.model.loss_kernels import LossKernels, TorchLossKernels
from ghostvis_mega.parallel.groups import Groups
from tests.model.loss_cases import SCALE, TOKENS, VOCABULARY, Case, Outcome, distance, make_case
from tests.model.loss_cases import unfused as plain_outcome

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
BARS = {torch.float32: 5e-6, torch.bfloat16: 6e-3}


def fused(
    case: Case,
    groups: Groups,
    *,
    kernels: LossKernels | None = None,
    rows: int = 256,
    straight: bool = False,
) -> Outcome:
    """`straight`: the weight's gradient goes into `main_grad`, on top of ones."""
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
        expected_grad=SCALE if straight else None,
    )
    if straight:
        weight_VH.grad = weight_VH.main_grad = torch.ones_like(weight_VH, dtype=torch.float32)
    loss = head_loss(hidden_RH, weight_VH, targets, group=groups.tensor)
    (loss * SCALE).backward()
    assert weight_VH.grad.dtype == torch.float32
    change_VH = weight_VH.grad - 1.0 if straight else weight_VH.grad
    return Outcome(loss.detach(), hidden_RH.grad, change_VH)


def parts(outcome: Outcome) -> list[torch.Tensor]:
    return [part.cpu() for part in (outcome.loss, outcome.hidden, outcome.weight)]


def worst(one: Outcome, other: Outcome) -> float:
    return max(distance(a, b) for a, b in zip(parts(one), parts(other), strict=True))


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("rows", [256, 300, 1000])
def test_loss_and_gradients_are_exact(gpu_groups: Groups, dtype: torch.dtype, rows: int) -> None:
    case = make_case(rows=600, hidden=128, dtype=dtype)
    truth = plain_outcome(case, dtype=torch.float64)
    assert worst(fused(case, gpu_groups, rows=rows), truth) <= BARS[dtype]
    case.labels_R += 1
    assert worst(fused(case, gpu_groups, rows=rows), truth) > 0.1


@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_the_fused_kernels_are_pytorchs(gpu_groups: Groups, dtype: torch.dtype) -> None:
    assert type(default_kernels(GPU)).__name__ == "TritonLossKernels"
    case = make_case(rows=600, hidden=128, dtype=dtype)
    ours, theirs = fused(case, gpu_groups), fused(case, gpu_groups, kernels=TorchLossKernels())
    assert worst(ours, theirs) <= (1e-6 if dtype == torch.float32 else 1e-3)


def test_equal_input_gives_equal_bits(gpu_groups: Groups) -> None:
    case = make_case(rows=600, hidden=128, dtype=torch.bfloat16)
    first, second = fused(case, gpu_groups), fused(case, gpu_groups)
    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))


@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_the_sum_of_micro_batches_gets_the_same_gradient(
    gpu_groups: Groups, dtype: torch.dtype
) -> None:
    case = make_case(rows=600, hidden=128, dtype=dtype)
    truth = plain_outcome(case, dtype=torch.float64)
    # Ones that come and go cost a few bits.
    assert worst(fused(case, gpu_groups, straight=True), truth) <= max(BARS[dtype], 2e-5)


def test_rows_of_the_embedding_add_up_in_the_same_order_each_time() -> None:
    generator = torch.Generator().manual_seed(3)
    at_n = torch.randint(-1, 900, (8192,), generator=generator)
    rows_nH = torch.randn(8192, 1536, generator=generator).to(torch.bfloat16)
    found = []
    for _ in range(2):
        out_VH = torch.ones(VOCABULARY // 8, 1536, device=GPU)
        add_rows_(out_VH, at_n.to(GPU), rows_nH.to(GPU))
        found.append(out_VH.cpu())
    truth = torch.ones(VOCABULARY // 8, 1536, dtype=torch.float64)
    truth.index_add_(0, at_n[at_n >= 0], rows_nH[at_n >= 0].double())
    assert torch.equal(*found)
    assert distance(found[0], truth) <= 1e-6
    assert distance(found[0].roll(1, 0), truth) > 1e-2
