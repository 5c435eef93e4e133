"""A GPU: Transformer Engine's kernel, and a model with it, against Megatron-Core's own steps."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.model import rope
from ghostvis_mega.model.inputs import ModelInput, model_input
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.megatron import BlockLayout, transformer_config
from ghostvis_mega.model.rope import Angles, split_and_rotate, split_and_rotate_plain
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import llm_config, make_pack, make_rows

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
BARS = {torch.float32: 2e-6, torch.bfloat16: 1e-3}
LENGTHS = (40, 1, 130, 85)
MODEL = {"hidden_size": 256, "head_dim": 64, "ffn_hidden_size": 512, "vocab_size": 512}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).norm() / other.norm())


def angles_of(positions_S: torch.Tensor, width: int) -> torch.Tensor:
    frequencies = 1e4 ** -(torch.arange(0, width, 2) / width)
    half = torch.outer(positions_S.float(), frequencies)
    return torch.cat((half, half), dim=-1)[:, None, None, :]


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize(
    ("batch", "groups", "queries", "width"),
    [
        pytest.param(1, 2, 6, 128, id="1.5B"),
        pytest.param(1, 4, 7, 128, id="7B"),
        pytest.param(3, 1, 4, 64, id="one key, rows of three"),
        pytest.param(2, 12, 1, 64, id="as many keys"),
    ],
)
def test_the_kernel_is_the_plain_one(
    dtype: torch.dtype, batch: int, groups: int, queries: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(7)
    positions_S = torch.cat([torch.arange(length) for length in (1500, 1, 499)])
    q_angles = angles_of(positions_S, width)
    # Keys have angles of their own, so that tables which change places are seen.
    k_angles = angles_of(positions_S + 1, width)
    widths = [queries * width, width, width]
    mixed = torch.randn(2000, batch, groups, sum(widths), generator=generator).to(dtype)
    weights = [
        torch.randn(2000, batch, heads, width, generator=generator).to(dtype)
        for heads in (groups * queries, groups, groups)
    ]

    def run(device: torch.device, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        split = split_and_rotate if device == GPU else split_and_rotate_plain
        given = mixed.detach().to(device).requires_grad_()
        parts = split(given, q.to(device), k.to(device), widths=widths)
        torch.autograd.backward(parts, [weight.to(device) for weight in weights])
        return [*(part.detach() for part in parts), given.grad]

    truth = run(torch.device("cpu"), q_angles, k_angles)
    from transformer_engine.pytorch.attention.rope import FusedQKVRoPEFunc

    apply = FusedQKVRoPEFunc.apply
    with mock.patch.object(FusedQKVRoPEFunc, "apply", wraps=apply) as called:
        got = run(GPU, q_angles, k_angles)
    assert called.call_count == 1
    assert [part.shape for part in got] == [part.shape for part in truth]
    assert [part.dtype for part in got] == [dtype] * 4
    assert max(map(distance, got, truth)) <= BARS[dtype]
    swapped = run(GPU, k_angles, q_angles)
    assert min(distance(swapped[i], truth[i]) for i in (0, 1, 3)) > 0.02
    assert torch.equal(swapped[2].cpu(), truth[2])


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(8, 500, shape, generator=torch.Generator().manual_seed(2))


def pack() -> MicroBatch:
    return make_pack(list(tokens(sum(LENGTHS)).split(LENGTHS)))


def rows() -> MicroBatch:
    return make_rows(tokens(2, 128), torch.ones(2, 128))


def outcome(groups: object, batch: MicroBatch, *, fused: bool) -> dict[str, torch.Tensor]:
    """Loss and all gradients of a small model of Transformer Engine's layers in BF16."""
    llm = llm_config(**MODEL)
    config = transformer_config(llm, layout=BlockLayout(), dtype=torch.bfloat16, backend="te")
    chunk = LLMChunk(config, llm, groups=groups, backend="te", fused_rope=fused).to(GPU)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in chunk.global_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (1.0 if "norm" in name else 0.0))
    inputs = model_input(batch, tokens_per_image=1, device=GPU, for_sdpa=False)
    loss = chunk.loss_sum(chunk(inputs, None), inputs)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in chunk.global_parameters()}


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert one.keys() == other.keys()
    return max((distance(one[name], other[name]), name) for name in other)


# Megatron-Core and Transformer Engine warn of much on a GPU that is not of this test.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("batch", [pack, rows])
def test_a_model_equals_megatrons_steps(gpu_groups: Groups, batch: type) -> None:
    truth = outcome(gpu_groups.megatron, batch(), fused=False)
    with mock.patch.object(rope, "split_and_rotate", wraps=split_and_rotate) as split:
        found = outcome(gpu_groups.megatron, batch(), fused=True)
    assert split.call_count == 3
    # Each is BF16's own noise away from the truth, 1.2e-2, some parameters 1.4 times as far.
    assert worst(found, truth) <= (5e-2, "")


@pytest.mark.filterwarnings("default")
def test_the_comparison_of_models_sees_keys_that_do_not_restart(gpu_groups: Groups) -> None:
    right = LLMChunk._rotary

    def broken(chunk: LLMChunk, inputs: ModelInput) -> Angles:
        running = torch.arange(inputs.positions_BW.shape[1], device=GPU)
        return right(chunk, inputs), right(chunk, replace(inputs, positions_BW=running[None]))

    truth = outcome(gpu_groups.megatron, pack(), fused=False)
    with mock.patch.object(LLMChunk, "_rotary", broken):
        assert worst(outcome(gpu_groups.megatron, pack(), fused=True), truth) > (0.1, "")
