"""Padding rows of the vocabulary take no probability, get no gradient and stay zero."""

from unittest import mock

import pytest
import torch

from ghostvis_mega.config.rules_model import model_problems
from ghostvis_mega.config.schema import LLMConfig, ModelConfig
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import all_logits, llm_config, make_llm, make_rows, to_input
from tests.model.test_llm import random_tokens

PADDING = 24
PADDED = 96 + PADDING


def pair(groups: Groups, *, tied: bool) -> tuple[LLMChunk, LLMChunk]:
    """A model of 96 tokens, and the same with rows of padding that are far from zero."""
    plain = make_llm(llm_config(tied_embeddings=tied), groups)
    settings = {"vocab_size": PADDED, "vocab_padding": PADDING, "tied_embeddings": tied}
    padded = make_llm(llm_config(**settings), groups)
    with torch.no_grad():
        theirs = dict(plain.global_parameters())
        for name, parameter in padded.global_parameters():
            parameter[: len(theirs[name])] = theirs[name]
    return plain, padded


def loss_and_gradients(chunk: LLMChunk) -> tuple[float, dict[str, torch.Tensor]]:
    inputs = to_input(make_rows(random_tokens(3, 12), torch.ones(3, 12)))
    loss = chunk.loss_sum(chunk(inputs, None), inputs)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in chunk.global_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_true_vocabulary(groups: Groups, tied: bool) -> None:
    plain, padded = pair(groups, tied=tied)
    loss, gradients = loss_and_gradients(plain)
    found, others = loss_and_gradients(padded)
    assert found == pytest.approx(loss, rel=1e-6)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        rows = others[name][: len(gradient)]
        assert (rows - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert not others[name][len(gradient) :].any(), name
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        scores = all_logits(padded, make_rows(tokens, torch.ones(1, 9)))
    assert (scores[..., 96:] == float("-inf")).all() and scores[..., :96].isfinite().all()


def test_without_the_mask_padding_would_learn(groups: Groups) -> None:
    plain, padded = pair(groups, tied=False)
    loss, _ = loss_and_gradients(plain)
    unmasked = padded.llm.model_copy(update={"vocab_padding": 0})
    with mock.patch.object(padded, "llm", unmasked):
        found, gradients = loss_and_gradients(padded)
    assert found > loss + 0.1
    assert gradients["head.weight"][96:].abs().min() > 0


def test_padding_stays_zero_through_updates_with_decay(groups: Groups) -> None:
    settings = {"vocab_size": PADDED, "vocab_padding": PADDING, "tied_embeddings": False}
    chunk = make_llm(llm_config(**settings), groups)
    chunk.initialize(3)
    tables = [p for n, p in chunk.global_parameters() if n in ("embedding.weight", "head.weight")]
    before = [table.detach().clone() for table in tables]
    optimizer = torch.optim.AdamW(chunk.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_and_gradients(chunk)
        optimizer.step()
    assert len(tables) == 2
    for table, old in zip(tables, before, strict=True):
        assert old[:96].any() and not old[96:].any()
        assert not table[96:].any() and (table[:96] != old[:96]).any()


def test_padding_must_leave_tokens() -> None:
    llm = LLMConfig(**llm_config().model_dump() | {"vocab_padding": 96})
    (problem,) = model_problems(ModelConfig(llm=llm))
    assert "model.llm.vocab_padding=96 leaves no token of model.llm.vocab_size=96" in problem
