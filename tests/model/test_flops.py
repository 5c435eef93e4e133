"""The closed form of the FLOPs equals what torch counts, product by product."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from ghostvis_mega.config.presets import MODEL_PRESETS
from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.config.sizes import llm_parameters, parameter_counts
from ghostvis_mega.model.flops import batch_flops
from ghostvis_mega.model.vision import VisionEncoder

LLM = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_hidden_size": 80,
    "vocab_size": 96,
    "max_positions": 128,
}
TOWER = {
    "kind": "siglip",
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "ffn_hidden_size": 72,
    "image_size": 32,
    "patch_size": 8,
}


def model_of(*, kind: str = "perceiver_mlp", tower: dict | None = None) -> ModelConfig:
    tokens = None if kind == "mlp" else 4
    connector = {"kind": kind, "tokens_per_image": tokens, "num_heads": 2}
    return ModelConfig(llm=LLM, vision={**TOWER, **(tower or {})}, connector=connector)


def qwen2(model: ModelConfig) -> Qwen2ForCausalLM:
    llm = model.llm
    config = Qwen2Config(
        num_hidden_layers=llm.num_layers,
        hidden_size=llm.hidden_size,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        head_dim=llm.head_dim,
        intermediate_size=llm.ffn_hidden_size,
        vocab_size=llm.vocab_size,
        tie_word_embeddings=llm.tied_embeddings,
        # Unfused products, which the counter sees on a CPU.
        attn_implementation="eager",
    )
    return Qwen2ForCausalLM(config)


def counted_llm(model: ModelConfig, *, lengths: list[int], frozen: bool) -> tuple[int, int]:
    """(forward, backward) as torch counts them, one sequence after the other."""
    net = qwen2(model).requires_grad_(not frozen)
    forward = backward = 0
    for length in lengths:
        embeddings = net.get_input_embeddings()(torch.zeros(1, length, dtype=torch.long))
        if frozen:  # as leaves: image embeddings want a gradient
            embeddings = embeddings.detach().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            logits = net(inputs_embeds=embeddings).logits
        forward += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            logits.sum().backward()
        backward += counter.get_total_flops()
    return forward, backward


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_llm_equals_qwen2(frozen: bool):
    model, lengths = model_of(), [7, 16, 5]
    flops = batch_flops(
        model,
        segments=lengths,
        head_rows=sum(lengths),
        num_images=1,
        trained={"projector"} if frozen else {"llm"},
        attention="full",
    )
    assert (flops.llm.forward, flops.llm.backward) == counted_llm(
        model, lengths=lengths, frozen=frozen
    )


def test_the_check_notices_another_convention():
    model = model_of()
    causal = batch_flops(model, segments=[16], head_rows=16, num_images=0, trained={"llm"})
    assert causal.llm.forward != counted_llm(model, lengths=[16], frozen=False)[0]
    full = batch_flops(
        model, segments=[16], head_rows=16, num_images=0, trained={"llm"}, attention="full"
    )
    # Half of the two products of attention, in each of the two layers.
    assert full.llm.forward - causal.llm.forward == 2 * (2 * 16 * 16 * 64)
    assert full.llm.backward == 2 * full.llm.forward


def counted_vision(model: ModelConfig, trained: set[str], num_images: int) -> tuple[int, int]:
    encoder = VisionEncoder(model)
    parts = {
        "vision": encoder.tower,
        "resampler": encoder.resampler,
        "projector": encoder.projector,
    }
    for name, part in parts.items():
        if name not in trained:
            part.requires_grad_(False)
    size = model.vision.image_size
    pixels = torch.zeros(num_images, 3, size, size, dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = encoder(pixels)
        forward = counter.get_total_flops()
        if not out.requires_grad:
            return forward, 0
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        return forward, counter.get_total_flops()


PARTS = ("vision", "resampler", "projector")
SUBSETS = [set(c) for n in range(4) for c in itertools.combinations(PARTS, n)]


@pytest.mark.parametrize("trained", SUBSETS, ids=lambda s: "+".join(sorted(s)) or "none")
def test_vision_side_equals_the_real_modules_whatever_is_frozen(trained: set[str]):
    model = model_of()
    flops = batch_flops(model, segments=[8], head_rows=8, num_images=3, trained=trained)
    assert (flops.vision.forward, flops.vision.backward) == counted_vision(model, trained, 3)


@pytest.mark.parametrize("kind", ["mlp", "avgpool_mlp", "perceiver_mlp"])
@pytest.mark.parametrize("tower", [{}, {"kind": "clip", "feature_layer": -2}, {"post_norm": True}])
def test_vision_side_equals_the_real_modules_of_each_kind(kind: str, tower: dict):
    model = model_of(kind=kind, tower=tower)
    trained = set(model.modules[1:])
    flops = batch_flops(model, segments=[8], head_rows=8, num_images=2, trained=trained)
    assert (flops.vision.forward, flops.vision.backward) == counted_vision(model, trained, 2)


def test_recomputation_is_reported_apart():
    model = model_of()
    given = {"segments": [16, 16], "head_rows": 5, "num_images": 2}
    once = batch_flops(model, **given, trained={"llm", "projector"}, tower_recompute=False)
    again = batch_flops(model, **given, trained={"llm", "projector"}, llm_recompute="full")
    assert once.vision.recompute == 0 and again.vision.recompute == again.vision.forward
    head = 2 * 5 * LLM["hidden_size"] * LLM["vocab_size"]
    assert again.llm.recompute == again.llm.forward - head
    assert again.total == once.total
    mlps = batch_flops(model, **given, trained={"llm", "projector"}, llm_recompute="selective")
    gate, up, down = 3 * [2 * 32 * LLM["hidden_size"] * LLM["ffn_hidden_size"]]
    assert mlps.llm.recompute == LLM["num_layers"] * (gate + up + down)
    frozen = batch_flops(model, **given, trained={"llm"})
    assert frozen.vision.recompute == 0, "nobody needs the tower's graph"


def test_text_batch_through_a_frozen_llm_has_no_backward():
    flops = batch_flops(
        model_of(), segments=[16], head_rows=16, num_images=0, trained={"projector"}
    )
    assert flops.llm.backward == 0 and flops.vision.total == 0


def test_seven_billion_parameters_take_six_flops_each_and_token():
    model = ModelConfig(**MODEL_PRESETS["qwen25_7b"])
    tokens = 4096
    flops = batch_flops(model, segments=[tokens], head_rows=tokens, num_images=0, trained={"llm"})
    table = model.llm.vocab_size * model.llm.hidden_size
    weights = 6 * (llm_parameters(model.llm) - table)
    core = 6 * 2 * tokens * 3584 * 28 // 2
    assert flops.total / tokens == pytest.approx(weights + core, rel=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "avgpool_mlp", "perceiver_mlp"])
@pytest.mark.parametrize("tower", [{}, {"kind": "clip"}])
def test_parameter_counts_equal_the_real_modules(kind: str, tower: dict):
    model = model_of(kind=kind, tower=tower)
    encoder = VisionEncoder(model)
    real = {
        "llm": qwen2(model),
        "vision": encoder.tower,
        "resampler": encoder.resampler,
        "projector": encoder.projector,
    }
    real_counts = {n: sum(p.numel() for p in m.parameters()) for n, m in real.items()}
    assert parameter_counts(model) == {n: real_counts[n] for n in model.modules}
