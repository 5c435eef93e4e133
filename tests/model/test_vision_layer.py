"""The tower's fused layers against transformers' own, and one compiled program for all of them."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend

from ghostvis_mega.config.schema import ConnectorConfig, VisionConfig
from ghostvis_mega.model import vision_layer
from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.model.vision_layer import TUNED_FOR, FusedLayers

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


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_fused_layers_are_those_of_transformers(kind: str) -> None:
    truth = outcome(encoder(kind))
    assert sum(name.startswith("tower.") for name in truth) > 40 if kind == "siglip" else 30
    assert distance(outcome(encoder(kind, FusedLayers(compiled=False))), truth) <= BAR


def test_gradients_go_to_sums_that_are_there() -> None:
    plain, made = encoder("siglip"), encoder("siglip", FusedLayers(compiled=False))
    for parameter in made.parameters():
        parameter.grad = parameter.main_grad = torch.ones_like(parameter)
    once = outcome(plain)
    made.zero_grad = lambda: None  # the sums of two passes
    outcome(made)
    twice = outcome(made)
    used = {name: p for name, p in made.named_parameters() if name in once}
    assert all(p.grad is p.main_grad for p in used.values())
    found = {name: (twice[name] - 1) / 2 for name in used}
    assert distance(found | {"embeddings": once["embeddings"]}, once) <= BAR


def _exchanged(x: torch.Tensor, norm: Any, qkv: Any, *, eps: float) -> torch.Tensor:
    q, k, v = zip(*(part.chunk(3) for part in qkv), strict=True)
    joined = [torch.cat(parts) for parts in zip(k, q, v, strict=True)]
    return vision_layer.before_attention(x, norm, joined, eps=eps)


def _without_bias(x: torch.Tensor, norm: Any, qkv: Any, *, eps: float) -> torch.Tensor:
    q, k, v = qkv[1].chunk(3)
    bias = torch.cat([q, k, torch.zeros_like(v)])
    return vision_layer.before_attention(x, norm, (qkv[0], bias), eps=eps)


@pytest.mark.parametrize("broken", [_exchanged, _without_bias])
def test_a_wrong_layer_would_be_seen(broken: Callable[..., torch.Tensor]) -> None:
    truth = outcome(encoder("siglip"))
    fused = FusedLayers(compiled=False)
    fused._before = broken
    wrong = outcome(encoder("siglip", fused)) | {
        name: value for name, value in truth.items() if name.endswith("v_proj.bias")
    }
    assert distance(wrong, truth) > 1e-3


def test_another_activation_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = outcome(encoder("clip"))
    monkeypatch.setitem(vision_layer._ACTIVATIONS, "quick_gelu", torch.nn.functional.gelu)
    assert distance(outcome(encoder("clip", FusedLayers(compiled=False))), truth) > 1e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_one_program_serves_all_layers_and_all_numbers_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a compiler that generates no code: what it is asked for is the same."""
    torch._dynamo.reset()
    counters = []

    def compile_counted(function: Callable[..., torch.Tensor], *, fullgraph: bool) -> Any:
        counters.append(CompileCounterWithBackend("aot_eager"))
        return real(function, fullgraph=fullgraph, backend=counters[-1])

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_counted)
    made, plain = encoder("siglip", FusedLayers(compiled=True)), encoder("siglip")
    for images in (3, 5, 1, 2, 7):
        # Its norms are other programs, which round otherwise.
        assert distance(outcome(made, images), outcome(plain, images)) <= 20 * BAR
        assert [counter.frame_count for counter in counters] == [1, 1]
    with torch.no_grad():
        for images in (4, 1, 6):
            made(torch.zeros((images, 3, 32, 32), dtype=torch.uint8))
    assert [counter.frame_count for counter in counters] == [2, 2]
    assert made(torch.zeros((0, 3, 32, 32), dtype=torch.uint8)).shape == (0, 16, 32)


Backend = Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable]


def compiled_by(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> FusedLayers:
    """Compiled by another compiler, which has compiled nothing yet."""
    torch._dynamo.reset()
    compile_with = partial(torch.compile, backend=backend)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", compile_with)
        return FusedLayers(compiled=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("first", [3, 7])
def test_programs_do_not_depend_on_the_first_number_of_images(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        values = (n.meta["example_value"] for n in graph.graph.find_nodes(op="placeholder"))
        shapes = (value.shape for value in values if isinstance(value, torch.Tensor))
        sizes.extend(size for shape in shapes for size in shape if isinstance(size, torch.SymInt))
        return lookup_backend("aot_eager")(graph, inputs)

    made = encoder("clip", compiled_by(look, monkeypatch))
    outcome(made, first)
    with torch.no_grad():
        made(torch.zeros((first + 1, 3, 32, 32), dtype=torch.uint8))
    # One input before attention and two after, with and without gradients.
    assert [size.node.hint for size in sizes] == 6 * [TUNED_FOR]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_gradients_of_bf16_weights_are_kept_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZeRO's engine asks for, over two backwards."""
    found = []
    for fused in (compiled_by(lookup_backend("aot_eager"), monkeypatch), None):
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_compiler_may_begin_while_gradients_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second forward of `tower.backward=recompute` does."""
    made = encoder("siglip", compiled_by(lookup_backend("aot_eager"), monkeypatch))
    for part in (made.tower, made.projector):
        part.to(torch.bfloat16)
    for parameter in made.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    made.zero_grad = lambda: None
    found = outcome(made)
    assert all(found[name].any() for name in found if "fc1" in name)


def test_what_deepspeed_puts_in_the_place_of_linear_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its stage 3, of an LLM's engine, changes PyTorch for all modules; in compiled layers its
    function loses gradients."""
    truth, fused = encoder("siglip"), FusedLayers(compiled=False)
    weights, x_NPC = vision_layer.weights_of(truth.tower.encoder.layers[0]), torch.ones(2, 4, 48)

    def replaced(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not PyTorch's own")

    monkeypatch.setattr(torch.nn.functional, "linear", replaced)
    with pytest.raises(AssertionError, match="own"):
        torch.nn.Linear(2, 2)(torch.ones(2))
    layer = truth.tower.encoder.layers[0]
    assert fused(layer, x_NPC).shape == x_NPC.shape
    assert vision_layer.before_attention(x_NPC, weights.norm1, weights.qkv, eps=1e-6).any()


def test_what_does_not_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        raise RuntimeError("no such compiler")

    made = encoder("siglip", compiled_by(failing, monkeypatch))
    with torch.no_grad(), pytest.raises(RuntimeError, match="no such compiler"):
        made(torch.zeros((2, 3, 32, 32), dtype=torch.uint8))
