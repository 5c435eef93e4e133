"""The vision side against transformers' towers, projector and whole LLaVA."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaModel,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ghostvis_mega.config.schema import ConnectorConfig, ModelConfig
from ghostvis_mega.model.vision import AveragePool, PerceiverResampler, VisionEncoder
from ghostvis_mega.model.vision_tower import VisionTower
from tests.model.llm_cases import llm_config

TOWER = {
    "kind": "siglip",
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "ffn_hidden_size": 72,
    "image_size": 32,
    "patch_size": 8,
}
STATISTICS = {
    "siglip": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


def make_encoder(
    *, connector: str = "mlp", tokens: int | None = None, **tower: object
) -> VisionEncoder:
    """A small encoder; also biases, norms and latents are random."""
    model = ModelConfig(
        llm=llm_config(),
        vision=TOWER | tower,
        connector={"kind": connector, "tokens_per_image": tokens, "num_heads": 4},
    )
    encoder = VisionEncoder(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return encoder.eval()


def random_pixels(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def stock_tower(encoder: VisionEncoder, *, attention: str = "eager") -> torch.nn.Module:
    """transformers' model with the encoder's tower weights."""
    vision = encoder.config
    sizes = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "attn_implementation": attention,
    }
    if vision.kind == "siglip":
        stock = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
    else:
        stock = CLIPVisionModel(CLIPVisionConfig(**sizes))
    stock.load_state_dict(encoder.tower.state_dict())
    return stock.eval()


def standardised(pixels_N3hw: torch.Tensor, kind: str) -> torch.Tensor:
    """Pixels as the published models' image processors hand them on."""
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS[kind])
    return (pixels_N3hw.float() / 255 - mean) / std


CHOICES = {
    "siglip, last layer before the norm": ({}, lambda out, norm: out.hidden_states[-1]),
    "siglip, one layer earlier": ({"feature_layer": -2}, lambda out, norm: out.hidden_states[-2]),
    "siglip, after the norm": ({"post_norm": True}, lambda out, norm: out.last_hidden_state),
    "clip, as LLaVA": (
        {"kind": "clip", "feature_layer": -2},
        lambda out, norm: out.hidden_states[-2][:, 1:],
    ),
    "clip, after the norm": (
        {"kind": "clip", "post_norm": True},
        lambda out, norm: norm(out.hidden_states[-1])[:, 1:],
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_features_equal_transformers(choice: str) -> None:
    tower, pick = CHOICES[choice]
    encoder = make_encoder(**tower)
    stock = stock_tower(encoder)
    pixels = random_pixels()
    with torch.no_grad():
        given = standardised(pixels, encoder.config.kind)
        out = stock(given, output_hidden_states=True)
        features = pick(out, stock.post_layernorm)
        torch.testing.assert_close(
            encoder(pixels), encoder.projector(features), rtol=1e-5, atol=1e-5
        )
        # The other choices are other numbers.
        for name, (settings, other) in CHOICES.items():
            if name != choice and settings.get("kind") == tower.get("kind"):
                wrong = other(out, stock.post_layernorm)
                assert (wrong - features).abs().max() > 1e-2


def gradients(tower: torch.nn.Module, embeddings_NPC: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all parameters that had a part in these embeddings."""
    tower.zero_grad()
    generator = torch.Generator().manual_seed(6)
    embeddings_NPC.backward(torch.randn(embeddings_NPC.shape, generator=generator))
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


def both_ways(encoder: VisionEncoder) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Embeddings after the last layer and gradients: ours, transformers'."""
    stock = stock_tower(encoder, attention="sdpa")
    pixels = standardised(random_pixels(), encoder.config.kind)
    found = []
    for tower, x_NPC in (
        (encoder.tower, encoder._features(pixels)),
        (stock, stock(pixels, output_hidden_states=True).hidden_states[-1]),
    ):
        x_NPC = x_NPC[:, -encoder.config.num_patches :]
        found.append((x_NPC.detach(), gradients(tower, x_NPC)))
    return found


def differing(encoder: VisionEncoder) -> set[str]:
    """What has not the same bits."""
    (mine, my_gradients), (theirs, their_gradients) = both_ways(encoder)
    names = {"embeddings"} if not torch.equal(mine, theirs) else set()
    assert my_gradients.keys() == their_gradients.keys()
    return names | {n for n, g in my_gradients.items() if not torch.equal(g, their_gradients[n])}


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_tower_is_that_of_transformers_bit_by_bit(kind: str) -> None:
    encoder = make_encoder(kind=kind)
    assert differing(encoder) == set()
    towers = encoder.tower, stock_tower(encoder)
    ours, theirs = ({n: p.shape for n, p in tower.named_parameters()} for tower in towers)
    assert ours == theirs


def swap_activation(tower: VisionTower) -> None:
    for layer in tower.encoder.layers:
        layer.mlp.activation = (
            "quick_gelu" if layer.mlp.activation != "quick_gelu" else "gelu_pytorch_tanh"
        )


def swap_eps(tower: VisionTower) -> None:
    for layer in tower.encoder.layers:
        layer.layer_norm1.eps = 1e-5 if layer.layer_norm1.eps == 1e-6 else 1e-6


def swap_heads(tower: VisionTower) -> None:
    for layer in tower.encoder.layers:
        layer.self_attn.num_heads = 2


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("change", [swap_activation, swap_eps, swap_heads])
def test_another_tower_would_be_seen(kind: str, change: Callable[[VisionTower], None]) -> None:
    encoder = make_encoder(kind=kind)
    change(encoder.tower)
    assert "embeddings" in differing(encoder)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_unused_parameters_are_those_without_gradient(kind: str) -> None:
    encoder = make_encoder(kind=kind, feature_layer=-2)
    encoder(random_pixels()).square().sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert without == {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert {name.split(".")[3] for name in without if "layers." in name} == {"2"}
    assert any("post_layernorm" in name for name in without)


def llava_config(encoder: VisionEncoder, tower: torch.nn.Module) -> LlavaConfig:
    vision = encoder.config
    text = Qwen2Config(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="default" if vision.kind == "clip" else "full",
    )


def test_projector_equals_llava() -> None:
    encoder = make_encoder()
    stock = LlavaMultiModalProjector(llava_config(encoder, stock_tower(encoder)))
    stock.load_state_dict(encoder.projector.state_dict())
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(encoder.projector(x), stock(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tower", [{"kind": "clip", "feature_layer": -2}, {"kind": "siglip"}])
def test_mlp_connector_equals_whole_llava(tower: dict) -> None:
    encoder = make_encoder(**tower)
    stock = stock_tower(encoder)
    llava = LlavaModel(llava_config(encoder, stock)).eval()
    llava.vision_tower.load_state_dict(stock.state_dict())
    llava.multi_modal_projector.load_state_dict(encoder.projector.state_dict())
    pixels = random_pixels()
    with torch.no_grad():
        theirs = llava.get_image_features(standardised(pixels, encoder.config.kind))
        theirs = torch.stack(list(getattr(theirs, "pooler_output", theirs)))
        torch.testing.assert_close(encoder(pixels), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "tokens"), [(4, 4), (6, 9), (24, 144), (24, 64), (3, 9)])
def test_average_pool_equals_adaptive(grid: int, tokens: int) -> None:
    x_NPC = torch.randn(2, grid**2, 5, generator=torch.Generator().manual_seed(1))
    square = x_NPC.view(2, grid, grid, 5).permute(0, 3, 1, 2)
    side = int(tokens**0.5)
    expected = F.adaptive_avg_pool2d(square, side).permute(0, 2, 3, 1).reshape(2, tokens, 5)
    torch.testing.assert_close(AveragePool(grid, tokens)(x_NPC), expected)


def test_average_pool_averages_neighbours_not_a_row() -> None:
    x_NPC = torch.arange(16.0).view(1, 16, 1)
    assert AveragePool(4, 4)(x_NPC).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_perceiver_reads_all_patches_in_any_order() -> None:
    connector = ConnectorConfig(kind="perceiver_mlp", tokens_per_image=6, num_heads=4)
    resampler = PerceiverResampler(connector, 32, 6)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in resampler.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
        x_NPC = torch.randn(2, 10, 32, generator=generator)
        out = resampler(x_NPC)
        assert out.shape == (2, 6, 32)
        shuffled = x_NPC[:, torch.randperm(10, generator=generator)]
        torch.testing.assert_close(resampler(shuffled), out, rtol=1e-5, atol=1e-5)
        for patch in range(10):
            changed = x_NPC.clone()
            changed[0, patch] *= -1.0
            differs = (resampler(changed) - out).abs().amax(dim=(1, 2))
            assert differs[0] > 1e-3
            assert differs[1] == 0.0


@pytest.mark.parametrize(
    ("connector", "tokens", "count"),
    [("mlp", None, 16), ("avgpool_mlp", 4, 4), ("perceiver_mlp", 6, 6)],
)
def test_each_connector_gives_its_number_of_embeddings(
    connector: str, tokens: int | None, count: int
) -> None:
    encoder = make_encoder(connector=connector, tokens=tokens)
    with torch.no_grad():
        assert encoder(random_pixels()).shape == (3, count, 48)
        one = encoder(random_pixels()[1:2])
        torch.testing.assert_close(encoder(random_pixels())[1:2], one, rtol=1e-5, atol=1e-5)
