"""The mask of the layout-free dropout: right by its definition, random by every test, and used by
the model in training alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ghostvis_mega.model.dropout import (
    ATTENTION,
    EMBEDDING,
    MLP,
    Draw,
    DropoutLayer,
    drop,
    drop_level,
    kept,
    position_keys,
)
from ghostvis_mega.model.inputs import model_input
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import CPU, llm_config, make_llm, make_rows

GOLDEN = 0x9E3779B97F4A7C15
ROWS, POSITIONS, WIDTH, RATE = 4, 256, 128, 0.1


def splitmix(value: int) -> int:
    """The finalizer, in whole numbers."""
    value %= 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def defined(
    *, seed: int, step: int, sample: int, position: int, layer: int, site: int, column: int
) -> bool:
    """Whether one element stays, by the definition and without tensors."""
    key = 0
    for part in (seed, step, sample):
        key = splitmix(key + (part + 1) * GOLDEN)
    key = splitmix(key + (position + 1) * GOLDEN)
    key = splitmix(key ^ splitmix((2 * layer + site + 1) * GOLDEN))
    bits = splitmix(key + (column // 4 + 1) * GOLDEN) >> (16 * (column % 4)) & 0xFFFF
    signed = bits - 2**16 if bits >= 2**15 else bits
    return signed >= round(RATE * 2**16) - 2**15


def mask(
    *,
    seed: int = 3,
    step: int = 7,
    samples: tuple[int, ...] = (0, 1, 2, 3),
    positions: int = POSITIONS,
    layer: int = 1,
    site: int = ATTENTION,
    width: int = WIDTH,
    rate: float = RATE,
) -> torch.Tensor:
    """bool [S, B, H]."""
    keys = position_keys(
        Draw(seed=seed, step=step), row_samples=samples, rows_S=torch.arange(positions)
    )
    return kept(keys, layer=layer, site=site, width=width, rate=rate)


def test_mask_is_the_definition() -> None:
    samples = (5, 2**40)
    found = mask(seed=2**31, step=11, samples=samples, positions=6, layer=27, site=MLP, width=10)
    for position in range(6):
        for row, sample in enumerate(samples):
            for column in range(10):
                assert bool(found[position, row, column]) == defined(
                    seed=2**31, step=11, sample=sample, position=position, layer=27, site=MLP,
                    column=column,
                )  # fmt: skip


def z_score(agree: int, count: int, chance: float) -> float:
    """Standard deviations that a count is from what chance gives."""
    return (agree - count * chance) / math.sqrt(count * chance * (1 - chance))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_right_everywhere(rate: float) -> None:
    dropped = ~mask(rate=rate)
    real = drop_level(rate) / 2**16
    assert abs(real - rate) <= 2**-17
    assert abs(z_score(int(dropped.sum()), dropped.numel(), real)) < 4
    # Chi-square over columns, over positions and over rows: mean d, deviation sqrt(2 d).
    for other in ((0, 1), (1, 2), (0, 2)):
        counts = dropped.sum(dim=other).double()
        each = dropped.numel() / len(counts)
        square = float(((counts - each * real) ** 2 / (each * real * (1 - real))).sum())
        assert abs(square - len(counts)) < 5 * math.sqrt(2 * len(counts))


def agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    """z-score of the number of elements whose fate is the same in two masks."""
    real = drop_level(RATE) / 2**16
    same = int((first == second).sum())
    return z_score(same, first.numel(), real**2 + (1 - real) ** 2)


def test_masks_of_other_places_are_independent() -> None:
    base = mask()
    others = {
        "seed": mask(seed=4),
        "step": mask(step=8),
        "layer": mask(layer=2),
        "site": mask(site=MLP),
        "embedding": mask(layer=EMBEDDING),
        "row": mask(samples=(1, 2, 3, 4)),
        "seed for step": mask(seed=7, step=3),
        "next position": base.roll(1, dims=0),
        "next column": base.roll(1, dims=2),
        "next hash": base.roll(4, dims=2),
        "next row": base.roll(1, dims=1),
    }
    found = {name: agreement(base, other) for name, other in others.items()}
    assert {name: z for name, z in found.items() if abs(z) > 4} == {}
    # Negative control: a mask agrees with itself far beyond chance.
    assert agreement(base, mask()) > 100


def test_each_row_keeps_its_mask_among_other_rows_and_in_parts() -> None:
    whole = mask()
    assert torch.equal(mask(samples=(2,))[:, 0], whole[:, 2])
    rows_S = torch.tensor([3, 4, 100, 255])
    keys = position_keys(Draw(seed=3, step=7), row_samples=(0, 1, 2, 3), rows_S=rows_S)
    part = kept(keys, layer=1, site=ATTENTION, width=WIDTH, rate=RATE)
    assert torch.equal(part, whole[rows_S])
    assert torch.equal(mask(width=50), whole[..., :50])


def test_drop_keeps_the_mean_and_its_gradient_has_the_same_mask() -> None:
    keys = position_keys(Draw(seed=3, step=7), row_samples=(0, 1), rows_S=torch.arange(64))
    x = torch.randn(64, 2, 32, dtype=torch.float64, requires_grad=True)
    place: dict[str, Any] = {"layer": 1, "site": MLP, "rate": 0.25}
    y = drop(x, keys, **place)
    keep = kept(keys, width=32, **place)
    assert torch.equal(y, torch.where(keep, x * (1 / 0.75), 0.0))
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(keep, gradient * (1 / 0.75), 0.0))


def test_levels() -> None:
    assert [drop_level(rate) for rate in (0.0, 1e-9, 0.5, 1 - 1e-9)] == [0, 1, 32768, 65535]


def make_chunk(groups: Groups, rate: float, recompute: str = "none") -> LLMChunk:
    return make_llm(llm_config(hidden_dropout=rate), groups, recompute=recompute)


def run_chunk(chunk: LLMChunk, *, step: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states and gradients of two rows."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(8, chunk.llm.vocab_size, (2, 16), generator=generator)
    batch = make_rows(tokens, torch.ones(2, 16))
    draw = None if step is None else Draw(seed=1, step=step)
    inputs = model_input(batch, tokens_per_image=4, device=CPU, for_sdpa=True, dropout=draw)
    chunk.zero_grad()
    hidden = chunk(inputs, None)
    chunk.loss_sum(hidden, inputs).backward()
    return hidden.detach(), {
        name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None
    }


def test_the_model_drops_in_training_alone(groups: Groups) -> None:
    chunk, plain = make_chunk(groups, 0.2), make_chunk(groups, 0.0)
    without, _ = run_chunk(plain, step=None)
    first, _ = run_chunk(chunk, step=0)
    again, _ = run_chunk(chunk, step=0)
    other, _ = run_chunk(chunk, step=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, without)
    chunk.eval()
    assert torch.equal(run_chunk(chunk, step=0)[0], without)
    # A rate of zero leaves Megatron-Core's own layer in place.
    assert type(plain.decoder.layers[0]).__name__ == "TransformerLayer"


def test_training_without_keys_is_refused(groups: Groups) -> None:
    chunk = make_chunk(groups, 0.2)
    with pytest.raises(ValueError, match="needs inputs with dropout keys"):
        run_chunk(chunk, step=None)
    with pytest.raises(ValueError, match="needs keys in context_mask"):
        chunk.decoder.layers[0](hidden_states=torch.zeros(4, 1, chunk.llm.hidden_size))


def two_in_flight(groups: Groups, recompute: str) -> dict[str, torch.Tensor]:
    """Gradients when two micro-batches go forward before either goes backward, as in a pipeline."""
    chunk = make_chunk(groups, 0.2, recompute=recompute)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for sample in (0, 1):
        tokens = torch.randint(8, chunk.llm.vocab_size, (1, 16), generator=generator)
        batch = replace(make_rows(tokens, torch.ones(1, 16)), sample_ids=(sample,))
        inputs = model_input(
            batch, tokens_per_image=4, device=CPU, for_sdpa=True, dropout=Draw(seed=1, step=0)
        )
        losses.append(chunk.loss_sum(chunk(inputs, None), inputs))
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in chunk.named_parameters() if p.grad is not None}


def test_recomputed_activations_have_the_same_mask(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_graph = two_in_flight(groups, "none")
    recomputed = two_in_flight(groups, "full")
    assert all(torch.allclose(g, recomputed[name], rtol=1e-5) for name, g in kept_graph.items())

    # Negative control: a recomputed forward that takes the keys of the last micro-batch.
    latest: list[torch.Tensor | None] = []
    forward = DropoutLayer.forward

    def stale(layer: DropoutLayer, *, context_mask: torch.Tensor | None, **keywords: Any) -> Any:
        if torch.is_grad_enabled():
            context_mask = latest[-1]
        else:
            latest.append(context_mask)
        return forward(layer, context_mask=context_mask, **keywords)

    monkeypatch.setattr(DropoutLayer, "forward", stale)
    wrong = two_in_flight(groups, "full")
    assert not all(torch.allclose(g, wrong[name], rtol=1e-2) for name, g in kept_graph.items())
