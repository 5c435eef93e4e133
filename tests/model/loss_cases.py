"""An output layer with a real vocabulary, the truth about its loss, and distances from it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

VOCABULARY = 152_064
PADDING = 128
"""Rows of it that are no tokens."""
TOKENS = VOCABULARY - PADDING


@dataclass
class Case:
    """Hidden states, the output matrix, and what the rows are scored for."""

    hidden_RH: torch.Tensor
    weight_VH: torch.Tensor
    labels_R: torch.Tensor
    weights_R: torch.Tensor


@dataclass
class Outcome:
    """A loss, and the gradients of 0.37 times that loss; None: not asked for."""

    loss: torch.Tensor
    hidden: torch.Tensor | None
    weight: torch.Tensor | None


SCALE = 0.37
"""What the loss is multiplied by before its backward."""


def make_case(*, rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> Case:
    """Scores of the order of 3, labels all over the vocabulary, weights between 0 and 1.

    Rows of padding score higher than any token, which shows where they count.
    """
    generator = torch.Generator().manual_seed(7)
    weight_VH = torch.randn(VOCABULARY, hidden, generator=generator) * 3.0 / hidden**0.5
    weight_VH[TOKENS:] *= 3.0
    labels_R = torch.randint(0, TOKENS, (rows,), generator=generator)
    # Every part of a vocabulary cut in four has the label of some row, the last token among them.
    labels_R[:4] = torch.arange(1, 5) * (VOCABULARY // 4) - 1
    labels_R[3] = TOKENS - 1
    return Case(
        hidden_RH=torch.randn(rows, hidden, generator=generator).to(dtype),
        weight_VH=weight_VH.to(dtype),
        labels_R=labels_R,
        weights_R=torch.rand(rows, generator=generator),
    )


def unfused(case: Case, *, dtype: torch.dtype) -> Outcome:
    """Plain autograd over all scores at once, in `dtype` from the case's own values."""
    hidden_RH = case.hidden_RH.to(dtype, copy=True).requires_grad_()
    weight_VH = torch.nn.Parameter(case.weight_VH.to(dtype, copy=True))
    if dtype == torch.bfloat16:
        weight_VH.grad_dtype = torch.float32
    scores_RV = F.linear(hidden_RH, weight_VH)
    scores_RV = scores_RV.to(torch.promote_types(dtype, torch.float32))
    hidden = torch.arange(VOCABULARY) >= TOKENS
    scores_RV = scores_RV.masked_fill(hidden, float("-inf"))
    loss_R = F.cross_entropy(scores_RV, case.labels_R, reduction="none")
    loss = (loss_R * case.weights_R).sum()
    (loss * SCALE).backward()
    return Outcome(loss.detach(), hidden_RH.grad, weight_VH.grad)


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())
