"""The fused output layer and loss against plain autograd over all scores at once."""

import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghostvis_mega.model import loss as loss_module
from ghostvis_mega.model.loss import LossTargets, head_loss, row_chunks
from ghostvis_mega.model.loss_kernels import TorchLossKernels
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import llm_config, make_llm, make_rows, to_input
from tests.model.loss_cases import SCALE, TOKENS, VOCABULARY, Case, Outcome, distance, make_case
from tests.model.loss_cases import unfused as plain_outcome
from tests.model.test_llm import random_tokens

ROWS, HIDDEN = 48, 64
BAR = 1e-6
"""Relative distance from fp64; that of the unfused path in fp32 is up to 3e-6."""


@pytest.fixture(scope="module", name="case")
def _case() -> Case:
    return make_case(rows=ROWS, hidden=HIDDEN)


@pytest.fixture(scope="module", name="truth")
def _truth(case: Case) -> Outcome:
    return plain_outcome(case, dtype=torch.float64)


def fused(
    case: Case,
    groups: Groups,
    *,
    rows: int = 20,
    tokens: int = TOKENS,
    hidden_trains: bool = True,
    weight_trains: bool = True,
) -> Outcome:
    """The operation in chunks of so many rows."""
    hidden_RH = case.hidden_RH.clone().requires_grad_(hidden_trains)
    weight_VH = nn.Parameter(case.weight_VH.clone(), requires_grad=weight_trains)
    if weight_trains and weight_VH.dtype == torch.bfloat16:
        weight_VH.grad_dtype = torch.float32
    targets = LossTargets(
        case.labels_R,
        case.weights_R,
        tokens=tokens,
        chunk_bytes=rows * VOCABULARY * weight_VH.element_size(),
    )
    loss = head_loss(hidden_RH, weight_VH, targets, group=groups.tensor)
    if loss.requires_grad:
        (loss * SCALE).backward()
    return Outcome(loss.detach(), hidden_RH.grad, weight_VH.grad)


def distances(found: Outcome, truth: Outcome) -> list[float]:
    pairs = ((found.loss, truth.loss), (found.hidden, truth.hidden), (found.weight, truth.weight))
    return [distance(one, other) for one, other in pairs]


@pytest.mark.parametrize("rows", [8, 16, 20, 48, 1000])
def test_loss_and_gradients_are_exact(
    groups: Groups, case: Case, truth: Outcome, rows: int
) -> None:
    assert max(distances(fused(case, groups, rows=rows), truth)) <= BAR


def test_one_row_is_as_exact_as_the_unfused_path(groups: Groups, case: Case) -> None:
    """BLAS sums a single row over the vocabulary less exactly, for either."""
    one = Case(case.hidden_RH[:1], case.weight_VH, case.labels_R[:1], case.weights_R[:1])
    truth = plain_outcome(one, dtype=torch.float64)
    usual = distances(plain_outcome(one, dtype=torch.float32), truth)
    assert max(distances(fused(one, groups), truth)) <= max(usual)


def test_a_dropped_chunk_would_be_seen(groups: Groups, case: Case, truth: Outcome) -> None:
    def fewer(*args: object, **options: object) -> list[slice]:
        return row_chunks(*args, **options)[:-1]

    with mock.patch.object(loss_module, "row_chunks", fewer):
        assert min(distances(fused(case, groups), truth)) > 5e-2


def test_unmasked_padding_would_be_seen(groups: Groups, case: Case, truth: Outcome) -> None:
    assert min(distances(fused(case, groups, tokens=VOCABULARY), truth)) > 5e-2
    assert not fused(case, groups).weight[TOKENS:].any()


def test_only_what_trains_is_computed(groups: Groups, case: Case, truth: Outcome) -> None:
    with mock.patch.object(loss_module, "_product", wraps=loss_module._product) as products:
        frozen = fused(case, groups, weight_trains=False)
        assert products.call_count == 3 and frozen.weight is None
        leaf = fused(case, groups, hidden_trains=False)
        assert products.call_count == 6 and leaf.hidden is None
        neither = fused(case, groups, hidden_trains=False, weight_trains=False)
        with torch.no_grad():
            scored = fused(case, groups)
        assert products.call_count == 6
    assert distance(frozen.hidden, truth.hidden) <= BAR
    assert distance(leaf.weight, truth.weight) <= BAR
    assert frozen.loss == leaf.loss == neither.loss == scored.loss


def test_bf16_is_no_worse_than_the_unfused_path(groups: Groups) -> None:
    case = make_case(rows=ROWS, hidden=HIDDEN, dtype=torch.bfloat16)
    truth = plain_outcome(case, dtype=torch.float64)
    usual = distances(plain_outcome(case, dtype=torch.bfloat16), truth)
    ours = distances(fused(case, groups), truth)
    # The loss differs by the order in which scores are summed alone.
    assert all(a <= 1.01 * b for a, b in zip(ours, usual, strict=True)), (ours, usual)
    # The weight's gradient is spared one rounding.
    assert ours[2] < 0.9 * usual[2]


def test_the_gradient_of_a_bf16_weight_is_as_exact_as_the_weight_asks(groups: Groups) -> None:
    case = make_case(rows=4, hidden=8, dtype=torch.bfloat16)
    full = fused(case, groups).weight
    assert full.dtype == torch.float32 and not torch.equal(full, full.bfloat16().float())
    weight_VH = nn.Parameter(case.weight_VH.clone())
    targets = LossTargets(case.labels_R, case.weights_R, tokens=TOKENS)
    (head_loss(case.hidden_RH, weight_VH, targets, group=groups.tensor) * SCALE).backward()
    assert weight_VH.grad.dtype == torch.bfloat16
    assert torch.equal(weight_VH.grad, full.bfloat16())


def test_no_rows_give_zeros(groups: Groups, case: Case) -> None:
    none = Case(case.hidden_RH[:0], case.weight_VH, case.labels_R[:0], case.weights_R[:0])
    found = fused(none, groups)
    assert found.loss == 0.0
    assert found.hidden.shape == (0, HIDDEN)
    assert found.weight.shape == (VOCABULARY, HIDDEN) and not found.weight.any()


def test_a_second_backward_is_refused(groups: Groups) -> None:
    case = make_case(rows=4, hidden=8)
    weight_VH = nn.Parameter(case.weight_VH)
    targets = LossTargets(case.labels_R, case.weights_R, tokens=TOKENS)
    loss = head_loss(case.hidden_RH, weight_VH, targets, group=groups.tensor)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("label", [TOKENS, VOCABULARY, -1])
def test_a_label_that_is_no_token_makes_the_loss_infinite(groups: Groups, label: int) -> None:
    case = make_case(rows=4, hidden=8)
    case.labels_R[2] = label
    assert fused(case, groups).loss == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_reaches_the_loss(groups: Groups, value: float) -> None:
    case = make_case(rows=4, hidden=8)
    case.hidden_RH[1, 3] = value
    found = fused(case, groups)
    assert found.loss.isnan() and found.weight.isnan().any() and found.hidden[1].isnan().any()


class WidestScores(TorchDispatchMode):
    """Most elements of a tensor that is as wide as the vocabulary and not as deep as the matrix."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if torch.is_tensor(tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCABULARY:
                self.most = max(self.most, tensor.shape[0])
        return out


def test_no_more_scores_than_a_chunk_are_held(groups: Groups) -> None:
    case = make_case(rows=ROWS, hidden=8)
    with WidestScores() as seen:
        fused(case, groups, rows=10)
    assert seen.most == 10
    with WidestScores() as seen:
        plain_outcome(case, dtype=torch.float32)
    assert seen.most == ROWS


@pytest.mark.parametrize(
    ("num_rows", "most", "sizes"),
    [
        (0, 100, []),
        (1, 100, [1]),
        (100, 100, [64, 36]),
        (100, 30, [30, 30, 30, 10]),
        (8192, 1765, [1664, 1664, 1664, 1664, 1536]),
        (1700, 1765, [1700]),
        (5, 0, [1, 1, 1, 1, 1]),
    ],
)
def test_chunks_of_rows(num_rows: int, most: int, sizes: list[int]) -> None:
    chunks = row_chunks(num_rows, 4, chunk_bytes=4 * most)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [row for chunk in chunks for row in range(num_rows)[chunk]] == list(range(num_rows))


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_learns_the_same(groups: Groups, tied: bool, padding: int) -> None:
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    weights[weights < 0.4] = 0.0
    inputs = to_input(make_rows(random_tokens(3, 12) % (96 - padding), weights))
    settings = llm_config(tied_embeddings=tied, vocab_padding=padding)
    found = []
    for on in (False, True):
        chunk = make_llm(settings, groups, fused_loss=on)
        chunk.loss_chunk_bytes = 7 * 96 * 4
        loss = chunk.loss_sum(chunk(inputs, None), inputs)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in chunk.global_parameters()}))
    (loss, gradients), (ours, others) = found
    assert distance(ours, loss) <= 1e-6 and others.keys() == gradients.keys()
    assert max(distance(others[name], gradients[name]) for name in gradients) <= 2e-6


def test_the_kernels_must_agree_on_who_has_the_label(groups: Groups, case: Case) -> None:
    """The statistics of one part alone, as on a rank whose others are not asked."""
    kernels = TorchLossKernels()
    scores_RV = case.hidden_RH @ case.weight_VH.t()
    part = kernels.statistics(
        scores_RV[:, :1000].contiguous(), torch.full((ROWS,), 1000), columns=1000
    )
    assert (part[:, 2] == -math.inf).all()
    torch.testing.assert_close(part[:, 0], scores_RV[:, :1000].amax(1), rtol=0.0, atol=0.0)
    none = kernels.statistics(scores_RV, case.labels_R, columns=0)
    assert none.tolist() == [[-math.inf, 0.0, -math.inf]] * ROWS
