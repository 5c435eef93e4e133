"""The tower's fused layers against its modules."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghostvis_mega.config.schema import ConnectorConfig, VisionConfig
from ghostvis_mega.model import vision_kernels
from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.model.vision_kernels import PlainKernels
from ghostvis_mega.model.vision_layer import FusedLayers

BAR = 1e-6


def model(kind: str) -> Any:
    """A small tower with heads of 24, and what reads it."""
    vision = VisionConfig(
        kind=kind,
        num_layers=3,
        hidden_size=48,
        num_heads=2,
        ffn_hidden_size=80,
        image_size=32,
        patch_size=8,
        feature_layer=-2 if kind == "clip" else -1,
    )
    return SimpleNamespace(
        vision=vision,
        connector=ConnectorConfig(kind="mlp"),
        llm=SimpleNamespace(hidden_size=32),
        tokens_per_image=vision.num_patches,
    )


def encoder(kind: str, fused: FusedLayers | None = None) -> VisionEncoder:
    """Of random weights; norms and biases too."""
    made = VisionEncoder(model(kind), fused=fused)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return made


def outcome(made: VisionEncoder, images: int = 3) -> dict[str, torch.Tensor]:
    """Embeddings and all gradients, fp32."""
    generator = torch.Generator().manual_seed(4)
    pixels_N3hw = torch.randint(0, 256, (images, 3, 32, 32), generator=generator).to(torch.uint8)
    made.zero_grad()
    out_NTH = made(pixels_N3hw.to(made.pixel_mean.device))
    out_NTH.backward(torch.randn(out_NTH.shape, generator=generator).to(out_NTH))
    gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return {"embeddings": out_NTH.detach()} | gradients


def distance(mine: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 distance; key biases have no gradient but rounding."""
    assert mine.keys() == truth.keys()
    return max(
        float((mine[name] - value).norm() / value.norm())
        for name, value in truth.items()
        if not name.endswith("k_proj.bias")
    )


PLAIN = FusedLayers(PlainKernels())


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize(("images", "bar"), [(3, BAR), (1, 10 * BAR)])
def test_fused_layers_are_those_of_the_modules(kind: str, images: int, bar: float) -> None:
    """The sums of a single picture's gradients cancel further."""
    truth = outcome(encoder(kind), images)
    assert sum(name.startswith("tower.") for name in truth) > (40 if kind == "siglip" else 30)
    assert distance(outcome(encoder(kind, PLAIN), images), truth) <= bar


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_so_they_are_without_gradients(kind: str) -> None:
    pixels_N3hw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        truth, mine = encoder(kind)(pixels_N3hw), encoder(kind, PLAIN)(pixels_N3hw)
    assert float((mine - truth).norm() / truth.norm()) <= BAR


def test_gradients_go_to_sums_that_are_there_when_the_backward_runs() -> None:
    plain, made = encoder("siglip"), encoder("siglip", PLAIN)
    once = outcome(plain)
    used = {name: p for name, p in made.named_parameters() if name in once}
    made.zero_grad = lambda: None  # the sums of two passes

    def begin(*_: Any) -> None:
        for parameter in used.values():
            if not hasattr(parameter, "main_grad"):
                parameter.grad = parameter.main_grad = torch.ones_like(parameter)

    made.projector.register_full_backward_pre_hook(begin)
    outcome(made)
    twice = outcome(made)
    assert all(p.grad is p.main_grad for p in used.values())
    found = {name: (twice[name] - 1) / 2 for name in used}
    assert distance(found | {"embeddings": once["embeddings"]}, once) <= BAR


class WithoutBias(PlainKernels):
    """The first biases of products are left out."""

    def linear(self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return super().linear(x_RI, weight, bias * (bias.numel() < 3 * 48))


class Exchanged(PlainKernels):
    """Keys for queries, in the forward alone."""

    def linear(self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out_RO = super().linear(x_RI, weight, bias)
        if len(weight) != 3 * 48:
            return out_RO
        q, k, v = out_RO.chunk(3, dim=1)
        return torch.cat([k, q, v], dim=1)


class MissedActivation(PlainKernels):
    """Its derivative is taken for one."""

    def activated_gradient(
        self, d_RO: torch.Tensor, weight: torch.Tensor, before_RI: torch.Tensor, *, name: str
    ) -> torch.Tensor:
        return self.input_gradient(d_RO, weight)


class AddedTwice(PlainKernels):
    """What goes to a sum is left to autograd as well."""

    def weight_gradient(
        self,
        d_RO: torch.Tensor,
        x_RI: torch.Tensor,
        bias: torch.Tensor,
        total: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        super().weight_gradient(d_RO, x_RI, bias, total)
        return super().weight_gradient(d_RO, x_RI, bias, None)


@pytest.mark.parametrize("broken", [WithoutBias, Exchanged, MissedActivation, AddedTwice])
def test_a_wrong_layer_would_be_seen(broken: type[PlainKernels]) -> None:
    found = []
    for fused in (None, FusedLayers(broken())):
        made = encoder("siglip", fused)
        for parameter in made.parameters():
            parameter.grad = parameter.main_grad = torch.zeros_like(parameter)
        made.zero_grad = lambda: None
        found.append(outcome(made))
    assert distance(found[1], found[0]) > 1e-3


def test_another_activation_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = outcome(encoder("clip"))
    monkeypatch.setitem(vision_kernels.ACTIVATIONS, "quick_gelu", torch.nn.functional.gelu)
    assert distance(outcome(encoder("clip", PLAIN)), truth) > 1e-3


def test_gradients_of_bf16_weights_are_kept_in_fp32() -> None:
    """As ZeRO's engine asks for, over two backwards."""
    found = []
    for fused in (PLAIN, None):
        made = encoder("siglip", fused)
        for part in (made.tower, made.projector):
            part.to(torch.bfloat16)
        for parameter in made.parameters():
            parameter.grad_dtype = torch.float32
        once = outcome(made)
        generator = torch.Generator().manual_seed(5)
        pixels_N3hw = torch.randint(0, 256, (4, 3, 32, 32), generator=generator).to(torch.uint8)
        made(pixels_N3hw).sum().backward()
        total = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        assert {gradient.dtype for gradient in total.values()} == {torch.float32}
        assert not torch.equal(
            total["projector.linear_1.weight"], once["projector.linear_1.weight"]
        )
        found.append((once, total))
    for mine, truth in zip(*found, strict=True):
        assert distance(mine, truth) <= 0.1


def test_what_deepspeed_puts_in_the_place_of_linear_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its stage 3, of an LLM's engine, changes PyTorch for all modules."""
    layer, x_NPC = encoder("siglip").tower.encoder.layers[0], torch.ones(2, 4, 48)

    def replaced(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not PyTorch's own")

    monkeypatch.setattr(torch.nn.functional, "linear", replaced)
    with pytest.raises(AssertionError, match="own"):
        torch.nn.Linear(2, 2)(torch.ones(2))
    PLAIN(layer, x_NPC).sum().backward()
    assert layer.mlp.fc1.weight.grad.any()
