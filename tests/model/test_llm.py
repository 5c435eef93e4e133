"""The LLM against transformers' models; packs against separate samples, without a leak."""

from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import nn

from ghostvis_mega.model.attention import SDPACoreAttention
from ghostvis_mega.model.llm import LLMChunk, splice
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import (
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    all_logits,
    hugging_face,
    hugging_face_weights,
    llm_config,
    make_llm,
    make_pack,
    make_rows,
    to_input,
)

BAR = 1e-5
"""Largest difference of a logit; they are of the order of 1."""

LENGTHS = (9, 1, 14, 6)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 96, shape, generator=generator)


def counted(layer: type[nn.Module]) -> AbstractContextManager[mock.Mock]:
    """Counts the calls of a kind of layer."""
    return mock.patch.object(layer, "forward", autospec=True, side_effect=layer.forward)


def make_samples(seed: int = 0) -> list[torch.Tensor]:
    return [random_tokens(length, seed=seed + number) for number, length in enumerate(LENGTHS)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="tied"),
        pytest.param({"tied_embeddings": False}, id="untied"),
        pytest.param({"num_kv_heads": 4}, id="one query a key"),
        pytest.param({"num_kv_heads": 1}, id="one key"),
        pytest.param(
            {"activation": "relu2", "qkv_bias": False, "tied_embeddings": False}, id="legacy"
        ),
    ],
)
def test_logits_equal_transformers(groups: Groups, changes: dict) -> None:
    chunk = make_llm(llm_config(**changes), groups)
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        mine = all_logits(chunk, make_rows(tokens, torch.ones(2, 20)))
        theirs = hugging_face(chunk)(tokens).logits
    assert theirs.std() > 0.3
    assert (mine - theirs).abs().max() <= BAR


@pytest.mark.parametrize("part", ["q_proj", "gate_proj", "norm"])
def test_comparison_sees_a_wrong_weight(groups: Groups, part: str) -> None:
    chunk = make_llm(llm_config(), groups)
    tokens = random_tokens(2, 20)
    model = hugging_face(chunk)
    weights = hugging_face_weights(chunk)
    name = next(name for name in weights if part in name and name.endswith("weight"))
    model.load_state_dict({name: weights[name].flip(0)}, strict=False)
    with torch.no_grad():
        mine = all_logits(chunk, make_rows(tokens, torch.ones(2, 20)))
        assert (mine - model(tokens).logits).abs().max() > 100 * BAR


def test_loss_sum_equals_weighted_cross_entropy(groups: Groups) -> None:
    chunk = make_llm(llm_config(), groups)
    tokens = random_tokens(3, 12)
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    weights[weights < 0.4] = 0.0
    weights[:, -1] = 0.0
    inputs = to_input(make_rows(tokens, weights))
    loss = chunk.loss_sum(chunk(inputs, None), inputs)
    logits = hugging_face(chunk)(tokens).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(loss, (each * weights[:, :-1].flatten()).sum(), rtol=1e-6, atol=0.0)


def test_packed_logits_equal_separate_samples(groups: Groups) -> None:
    chunk = make_llm(llm_config(), groups)
    samples = make_samples()
    with torch.no_grad():
        packed = all_logits(chunk, make_pack(samples))[0].split(LENGTHS)
        for sample, logits in zip(samples, packed, strict=True):
            alone = all_logits(chunk, make_rows(sample[None], torch.ones(1, len(sample))))[0]
            assert (logits - alone).abs().max() <= BAR


def outcome(
    chunk: LLMChunk, samples: list[torch.Tensor], vision_nH: torch.Tensor, merge: int | None = None
) -> dict[str, torch.Tensor]:
    """What samples 0, 1 and 3 of a pack get: logits, loss, and the gradients of that loss.

    Samples 0 and 2 show a picture.
    """
    pictures = {0: 2, 2: 4}
    batch = make_pack(samples, pictures=pictures, trained={0, 1, 3}, merge=merge)
    vision_nH = vision_nH.clone().requires_grad_()
    inputs = to_input(batch)
    hidden_SBH = chunk(inputs, vision_nH)
    parts = chunk.logits(hidden_SBH, torch.arange(sum(LENGTHS))).detach().split(LENGTHS)
    loss = chunk.loss_sum(hidden_SBH, inputs)
    named = dict(chunk.global_parameters())
    gradients = torch.autograd.grad(loss, [vision_nH, *named.values()])
    return {
        **{f"logits of sample {number}": parts[number] for number in range(len(LENGTHS))},
        "loss": loss.detach(),
        "gradient of sample 0's picture": gradients[0][:TOKENS_PER_IMAGE],
        "gradient of sample 2's picture": gradients[0][TOKENS_PER_IMAGE:],
        **dict(zip(named, gradients[1:], strict=True)),
    }


@pytest.fixture(name="pack")
def _pack() -> tuple[list[torch.Tensor], torch.Tensor]:
    samples = make_samples()
    for sample, start in ((samples[0], 2), (samples[2], 4)):
        sample[start : start + TOKENS_PER_IMAGE] = IMAGE_TOKEN
    return samples, torch.randn(
        2 * TOKENS_PER_IMAGE, 48, generator=torch.Generator().manual_seed(5)
    )


def changed(
    pack: tuple[list[torch.Tensor], torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pack with other text and another picture in sample 2."""
    samples, vision_nH = [sample.clone() for sample in pack[0]], pack[1].clone()
    samples[2][7:] = random_tokens(LENGTHS[2] - 7, seed=99)
    samples[2][:4] = random_tokens(4, seed=98)
    vision_nH[TOKENS_PER_IMAGE:] *= -2.0
    return samples, vision_nH


def test_changing_one_sample_leaves_the_others_bit_identical(groups: Groups, pack: tuple) -> None:
    chunk = make_llm(llm_config(), groups)
    before, after = outcome(chunk, *pack), outcome(chunk, *changed(pack))
    assert not torch.equal(before.pop("logits of sample 2"), after.pop("logits of sample 2"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not before["gradient of sample 2's picture"].any()
    assert before["gradient of sample 0's picture"].abs().max() > 1e-3


def test_merged_segments_leak(groups: Groups, pack: tuple) -> None:
    chunk = make_llm(llm_config(), groups)
    before, after = (outcome(chunk, *given, merge=2) for given in (pack, changed(pack)))
    assert not torch.equal(before["logits of sample 3"], after["logits of sample 3"])
    assert not torch.equal(before["loss"], after["loss"])
    assert before["gradient of sample 2's picture"].abs().max() > 1e-4
    # Causality keeps those before it clean.
    assert torch.equal(before["logits of sample 0"], after["logits of sample 0"])


# Megatron-Core warns in case the attention were Transformer Engine's.
@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
@pytest.mark.parametrize(
    ("recompute", "attention", "mlp"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)]
)
def test_recompute_runs_parts_again(
    groups: Groups, recompute: str, attention: int, mlp: int
) -> None:
    chunk = make_llm(llm_config(), groups, recompute=recompute)
    inputs = to_input(make_pack(make_samples()))
    with counted(SDPACoreAttention) as attended, counted(MLP) as widened:
        chunk.loss_sum(chunk(inputs, None), inputs).backward()
    assert attended.call_count == attention * chunk.llm.num_layers
    assert widened.call_count == mlp * chunk.llm.num_layers


def test_splice_fills_exactly_the_slots() -> None:
    text = torch.zeros(4, 2, 3)
    vision = torch.arange(1.0, 10.0).view(3, 3).requires_grad_()
    # Flat positions count s * B + b: (s=1, b=0), (s=2, b=0), (s=0, b=1).
    out = splice(text, torch.tensor([2, 4, 1]), vision)
    expected = torch.zeros(4, 2, 3)
    expected[1, 0], expected[2, 0], expected[0, 1] = vision.detach()
    assert torch.equal(out, expected)
    (out[1, 0].sum() * 2).backward()
    assert torch.equal(vision.grad, torch.tensor([[2.0] * 3, [0.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("given", [0, 2, 4])
def test_misaligned_pictures_raise_with_both_counts(given: int) -> None:
    vision = torch.zeros(given, 3) if given else None
    with pytest.raises(ValueError, match=f"3 image positions but {given} image embeddings"):
        splice(torch.zeros(4, 1, 3), torch.tensor([0, 1, 2]), vision)


def test_model_refuses_a_missing_picture(groups: Groups, pack: tuple) -> None:
    chunk = make_llm(llm_config(), groups)
    samples, vision_nH = pack
    inputs = to_input(make_pack(samples, pictures={0: 2, 2: 4}))
    with pytest.raises(ValueError, match="6 image positions but 3 image embeddings"):
        chunk(inputs, vision_nH[:TOKENS_PER_IMAGE])
