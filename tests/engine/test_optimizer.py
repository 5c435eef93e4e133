"""Learning-rate schedule and parameter groups."""

import math
import os

import pytest
import torch
from torch import nn

from ghostvis_mega.config.schema import LearningRates, ModelConfig, OptimConfig
from ghostvis_mega.engine.optimizer import (
    build_adamw,
    host_threads,
    lr_factor,
    module_of,
    parameter_groups,
)
from ghostvis_mega.model.vision import VisionEncoder


def factors(total: int, **settings: object) -> list[float]:
    optim = OptimConfig(**settings)
    return [lr_factor(step, optim=optim, total_steps=total) for step in range(total)]


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    values = factors(20, warmup_steps=4)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    # The first step already moves, and the schedule starts from the peak.
    assert values[4] == 1.0
    assert values[5] < 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_last_step_reaches_the_minimum(schedule: str, warmup: int) -> None:
    values = factors(31, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.1)
    assert values[-1] == pytest.approx(0.1, abs=1e-12)
    assert values[-2] > values[-1]
    decay = values[max(warmup, 0) :]
    assert all(a >= b for a, b in zip(decay, decay[1:], strict=False))


def test_cosine_and_linear_follow_their_curves() -> None:
    cosine = factors(21, min_lr_ratio=0.2)
    linear = factors(21, schedule="linear", min_lr_ratio=0.2)
    for step in range(21):
        assert cosine[step] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * step / 20)))
        assert linear[step] == pytest.approx(1.0 - 0.8 * step / 20)
    assert cosine[5] > linear[5], "a cosine falls later"


def test_constant_and_short_runs() -> None:
    assert factors(5, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert factors(1) == [1.0]
    assert factors(2, warmup_steps=5) == [0.2, 0.4]
    # A run that goes on after its planned end stays at the minimum.
    optim = OptimConfig(min_lr_ratio=0.1)
    assert lr_factor(500, optim=optim, total_steps=100) == pytest.approx(0.1)


MODEL = {
    "llm": {
        "num_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "ffn_hidden_size": 24,
        "vocab_size": 32,
        "max_positions": 32,
    },
    "vision": {
        "kind": "clip",
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_hidden_size": 24,
        "image_size": 8,
        "patch_size": 4,
    },
    "connector": {"kind": "perceiver_mlp", "tokens_per_image": 2, "num_heads": 2},
}
LLM_SHAPES = {
    "embedding.weight": (32, 16),
    "decoder.layers.0.input_layernorm.weight": (16,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (32, 16),
    "decoder.layers.0.self_attention.linear_qkv.bias": (32,),
    "decoder.final_layernorm.weight": (16,),
}
RATES = LearningRates(llm=1e-3, vision=2e-3, resampler=3e-3, projector=4e-3)


def named_parameters() -> dict[str, nn.Parameter]:
    llm = {name: nn.Parameter(torch.zeros(shape)) for name, shape in LLM_SHAPES.items()}
    encoder = VisionEncoder(ModelConfig(**MODEL))
    return llm | dict(encoder.named_parameters())


def test_groups_are_by_module_and_only_matrices_decay() -> None:
    named = named_parameters()
    names = {id(parameter): name for name, parameter in named.items()}
    groups = parameter_groups(named.items(), OptimConfig(lr=RATES, weight_decay=0.05))
    modules = ["llm", "vision", "resampler", "projector"]
    assert [group["module"] for group in groups] == [name for name in modules for _ in (0, 1)]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0] * 4
    assert [group["lr"] for group in groups[::2]] == [1e-3, 2e-3, 3e-3, 4e-3]
    grouped = [parameter for group in groups for parameter in group["params"]]
    trained = [parameter for parameter in named.values() if parameter.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trained)), "each trained parameter once"
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert module_of(name) == group["module"]
            plain = parameter.ndim < 2 or any(
                part in name for part in ("position_embedding", "class_embedding", "latents")
            )
            assert (group["weight_decay"] == 0.0) == plain, name


def test_without_decay_are_exactly_the_known_ones() -> None:
    named = {name: p for name, p in named_parameters().items() if p.ndim >= 2}
    groups = parameter_groups(named.items(), OptimConfig())
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in named.items() if id(parameter) in spared}
    assert {name.rsplit(".", 2)[-2 if name.endswith("weight") else -1] for name in names} == {
        "position_embedding",
        "latents",
    }


def test_frozen_parameters_are_left_out() -> None:
    named = named_parameters()
    for name, parameter in named.items():
        if module_of(name) in ("llm", "vision"):
            parameter.requires_grad_(False)
    groups = parameter_groups(named.items(), OptimConfig())
    assert [group["module"] for group in groups] == ["resampler"] * 2 + ["projector"] * 2
    for parameter in named.values():
        parameter.requires_grad_(False)
    assert parameter_groups(named.items(), OptimConfig()) == []


def test_adamw_has_the_settings_and_moves_each_module_by_its_rate() -> None:
    optim = OptimConfig(lr=RATES, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    named = {"embedding.weight": nn.Parameter(torch.ones(2, 2))}
    named["projector.linear_1.weight"] = nn.Parameter(torch.ones(2, 2))
    groups = parameter_groups(named.items(), optim)
    adamw = build_adamw(groups, optim, device=torch.device("cpu"))
    assert adamw.defaults["betas"] == (0.8, 0.9)
    assert adamw.defaults["eps"] == 1e-6
    for parameter in named.values():
        parameter.grad = torch.full((2, 2), 3.0)
    adamw.step()
    # The first step of Adam is the learning rate.
    for name, rate in (("embedding.weight", 1e-3), ("projector.linear_1.weight", 4e-3)):
        expected = torch.full((2, 2), 1.0 - rate)
        torch.testing.assert_close(named[name].detach(), expected, rtol=0.0, atol=1e-7)


def test_an_offloaded_update_takes_this_process_share_of_the_cores(monkeypatch):
    before = torch.get_num_threads()
    with host_threads(torch.device("cpu")) as threads:
        assert threads == torch.get_num_threads() == before
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12 * before))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(KeyError), host_threads(torch.device("cuda")) as threads:
        assert threads == torch.get_num_threads() == 3 * before
        raise KeyError
    assert torch.get_num_threads() == before


def test_an_offloaded_update_is_the_fused_one_and_computes_the_same():
    optim = OptimConfig()
    weights = []
    for offload in (False, True):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1001))
        groups = parameter_groups([("decoder.weight", parameter)], optim)
        adamw = build_adamw(groups, optim, device=torch.device("cpu"), offload=offload)
        assert adamw.defaults["fused"] is offload
        for step in range(3):
            parameter.grad = torch.linspace(step - 1, 1, 1001) ** 3
            adamw.step()
        weights.append(parameter.detach())
    assert torch.allclose(*weights, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(weights[0], torch.linspace(-1, 1, 1001), rtol=1e-6, atol=1e-7)
