"""Splitting and rotating at once against Megatron-Core's own steps: loss and all gradients."""

from unittest import mock

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.model import rope
from ghostvis_mega.model.context import ContextSlice
from ghostvis_mega.model.inputs import ModelInput, model_input
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.rope import Angles, rotate, split_and_rotate
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import (
    CPU,
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    llm_config,
    make_llm,
    make_pack,
    make_rows,
    to_input,
)

BAR = 1e-6
LENGTHS = (9, 1, 14, 6)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 96, shape, generator=generator)


def pack() -> MicroBatch:
    """Four samples, a picture in the first and in the third."""
    samples = [random_tokens(length, seed=number) for number, length in enumerate(LENGTHS)]
    for number, start in ((0, 2), (2, 4)):
        samples[number][start : start + TOKENS_PER_IMAGE] = IMAGE_TOKEN
    return make_pack(samples, pictures={0: 2, 2: 4})


def rows() -> MicroBatch:
    return make_rows(random_tokens(3, 12), torch.ones(3, 12))


def outcome(chunk: LLMChunk, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Loss and the gradients of everything that wants one."""
    vision_nH = None
    if batch.images:
        shape = (len(batch.images) * TOKENS_PER_IMAGE, chunk.llm.hidden_size)
        vision_nH = torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    inputs = to_input(batch)
    loss = chunk.loss_sum(chunk(inputs, vision_nH), inputs)
    wanted = {name: p for name, p in chunk.global_parameters() if p.requires_grad}
    if vision_nH is not None:
        wanted["pictures"] = vision_nH
    loss.backward()
    gradients = {name: p.grad for name, p in wanted.items()}
    chunk.zero_grad()
    return {"loss": loss.detach(), **gradients}


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative L2 distance, and of what."""
    assert one.keys() == other.keys()
    return max((float((one[n] - other[n]).norm() / other[n].norm()), n) for n in other)


CASES = [
    pytest.param({}, pack, "none", False, id="packed, biases, two queries a key"),
    pytest.param({}, rows, "none", False, id="unpacked"),
    pytest.param({"num_kv_heads": 1}, pack, "none", False, id="one key"),
    pytest.param({"num_kv_heads": 4, "qkv_bias": False}, pack, "none", False, id="as many keys"),
    pytest.param({}, pack, "none", True, id="frozen LLM"),
    pytest.param({}, pack, "full", False, id="layers run again"),
    pytest.param({}, rows, "selective", False, id="unpacked, MLPs run again"),
]


# Megatron-Core warns in case the attention were Transformer Engine's.
@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
@pytest.mark.parametrize(("changes", "batch", "recompute", "frozen"), CASES)
def test_it_equals_megatrons_steps(
    groups: Groups, changes: dict, batch: type, recompute: str, frozen: bool
) -> None:
    found = []
    for fused in (True, False):
        chunk = make_llm(llm_config(**changes), groups, recompute=recompute, fused_rope=fused)
        chunk.requires_grad_(not frozen)
        with mock.patch.object(rope, "split_and_rotate", wraps=split_and_rotate) as split:
            found.append(outcome(chunk, batch()))
        calls = chunk.llm.num_layers * (2 if recompute == "full" else 1)
        assert split.call_count == (calls if fused else 0)
    assert len(found[0]) == (2 if frozen else len(list(chunk.parameters())) + 1 + (batch is pack))
    assert worst(*found) <= (BAR, "")


def late_restart(_: LLMChunk, inputs: ModelInput) -> torch.Tensor:
    """Positions start again one token behind each boundary."""
    late_W = inputs.positions_BW[0].roll(1)
    late_W[0] = 0
    return late_W


def never_restarted(_: LLMChunk, inputs: ModelInput) -> torch.Tensor:
    return torch.arange(inputs.positions_BW.shape[1])


def one_further(_: LLMChunk, inputs: ModelInput) -> torch.Tensor:
    return inputs.positions_BW[0] + 1


@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize("wrong", [late_restart, never_restarted, one_further])
def test_the_comparison_sees_wrong_positions(groups: Groups, wrong: type, side: str) -> None:
    right = LLMChunk._rotary

    def broken(chunk: LLMChunk, inputs: ModelInput) -> Angles:
        angles = torch.outer(wrong(chunk, inputs).float(), chunk.inverse_frequencies)
        pair = right(chunk, inputs), torch.cat((angles, angles), dim=-1)[:, None, None, :]
        return pair if side == "keys" else pair[::-1]

    truth = outcome(make_llm(llm_config(), groups, fused_rope=False), pack())
    chunk = make_llm(llm_config(), groups)
    with mock.patch.object(LLMChunk, "_rotary", broken):
        assert worst(outcome(chunk, pack()), truth) > (1e-3, "")
    assert worst(outcome(chunk, pack()), truth) <= (BAR, "")


def test_queries_and_keys_have_angles_of_their_own() -> None:
    """Against complex numbers; values are left alone."""
    generator = torch.Generator().manual_seed(3)
    mixed_SBGX = torch.randn(7, 2, 3, 4 * 8, generator=generator, dtype=torch.float64)
    q_angles, k_angles = torch.randn(2, 7, 1, 1, 4, generator=generator).repeat(1, 1, 1, 1, 2)

    def turned(x_SBAD: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(*x_SBAD.chunk(2, dim=-1)) * torch.polar(
            torch.ones(7, 1, 1, 4, dtype=torch.float64), angles[..., :4].double()
        )
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    heads = mixed_SBGX.unflatten(-1, (4, 8))
    query, key, value = heads[..., :2, :].flatten(2, 3), heads[..., 2, :], heads[..., 3, :]
    given = mixed_SBGX.float()
    got = split_and_rotate(given, q_angles, k_angles, widths=[16, 8, 8])
    swapped = split_and_rotate(given, k_angles, q_angles, widths=[16, 8, 8])
    for one, other, x, angles in zip(
        got[:2], swapped[:2], (query, key), (q_angles, k_angles), strict=True
    ):
        assert one.shape == x.shape
        assert (one - turned(x, angles)).norm() <= BAR * x.norm()
        assert (other - turned(x, angles)).norm() > 0.1 * x.norm()
    assert torch.equal(got[2], value.float())


def test_too_few_angles_are_seen() -> None:
    mixed_SBGX, angles = torch.zeros(7, 1, 1, 24), torch.zeros(6, 1, 1, 8)
    with pytest.raises(AssertionError, match="one row of angles"):
        split_and_rotate(mixed_SBGX, angles, angles, widths=[8, 8, 8])


def test_bf16_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(4)
    x_SBAD = torch.randn(50, 1, 2, 8, generator=generator).bfloat16()
    angles = (100 * torch.randn(50, 1, 1, 4, generator=generator)).repeat(1, 1, 1, 2)
    assert torch.equal(rotate(x_SBAD, angles), rotate(x_SBAD.float(), angles).bfloat16())


class Ranks:
    """A group of two, of which this is one; nothing is sent."""

    def __init__(self, rank: int):
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_context_rank_has_the_angles_that_megatron_cuts_out(groups: Groups, rank: int) -> None:
    chunk = make_llm(llm_config(), groups)
    lengths = (8, 4, 16, 12)
    batch = make_pack([random_tokens(length, seed=length) for length in lengths])
    context = ContextSlice(2, rank)
    cut = model_input(batch, tokens_per_image=1, device=CPU, for_sdpa=False, context=context)
    local = chunk._rotary(cut)
    whole = chunk._rotary(to_input(batch))
    assert (local.shape, whole.shape) == ((20, 1, 1, 16), (40, 1, 1, 16))
    x_TAD = torch.randn(20, 3, 16, generator=torch.Generator().manual_seed(6))
    theirs = _apply_rotary_pos_emb_thd(x_TAD, batch.cu_seqlens, whole, cp_group=Ranks(rank))
    assert (rotate(x_TAD[:, None], local)[:, 0] - theirs).norm() <= BAR * theirs.norm()
    other = _apply_rotary_pos_emb_thd(x_TAD, batch.cu_seqlens, whole, cp_group=Ranks(1 - rank))
    assert (theirs - other).norm() > 0.1 * theirs.norm()
