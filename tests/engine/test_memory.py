"""Predicted memory against what PyTorch's allocator counted on H100s and H200s, and the choice that
rests on it."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.config.source import expand_presets
from ghostvis_mega.engine.memory import (
    MODES,
    USABLE,
    Recompute,
    layers_held,
    most_pictures,
    predict,
    unpredictable,
)
from ghostvis_mega.engine.recompute import choose, settle_recompute
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.train_bench.preset_parts import DEEPSPEED

GIB = 2**30
HALF_7B = {"preset": "qwen25_7b", "llm": {"num_layers": 14}}


def settings(model: str | dict[str, Any], tokens: int, **sections: dict[str, Any]) -> RunConfig:
    """A run in BF16 on packs of so many tokens, one a step and rank."""
    given: dict[str, dict[str, Any]] = {
        "model": {"preset": model} if isinstance(model, str) else model,
        "data": {"train": "unset", "seq_length": tokens},
        "batch": {"global_size": 8},
        "deepspeed": {"llm": str(DEEPSPEED / "zero2.json")},
        "train": {"steps": 1, "precision": "bf16"},
        "log": {"output": "unset"},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    expanded, problems = expand_presets(given)
    assert not problems
    return RunConfig.model_validate(expanded)


@dataclass(frozen=True)
class Measured:
    """A row of docs/performance.md."""

    name: str
    run: RunConfig
    peak_gib: float
    recompute: Recompute = "none"
    ranks: int = 1
    pictures: int = 0


DELAYED, TP2 = {"fp8": "delayed"}, {"tensor": 2}
WINDOWS = {"window": 1}
ALIGN = {"freeze": ("llm", "vision")}
ROWS = (
    Measured("1.5B, 8k", settings("qwen25_1_5b", 8192), 42.5),
    Measured("1.5B, 16k", settings("qwen25_1_5b", 16384), 58.4),
    Measured("1.5B, 25k", settings("qwen25_1_5b", 25600), 76.6),
    Measured("1.5B, selective", settings("qwen25_1_5b", 8192), 30.4, "selective"),
    Measured("1.5B, full", settings("qwen25_1_5b", 8192), 27.5, "full"),
    Measured("1.5B, full, 192k", settings("qwen25_1_5b", 196608), 62.3, "full"),
    Measured("1.5B, FP8", settings("qwen25_1_5b", 16384, train=DELAYED), 56.4),
    Measured("1.5B, scores", settings("qwen25_1_5b", 8192, train={"fused_loss": False}), 48.7),
    Measured("half 7B, 8k", settings(HALF_7B, 8192), 91.4),
    Measured("half 7B, 16k", settings(HALF_7B, 16384), 108.7),
    Measured("half 7B, FP8", settings(HALF_7B, 16384, train=DELAYED), 110.0),
    Measured("7B, 8k", settings("qwen25_7b", 8192), 120.2, ranks=2),
    Measured("7B, 4k", settings("qwen25_7b", 4096), 102.9, ranks=2),
    Measured("7B, FP8", settings("qwen25_7b", 8192, train=DELAYED), 127.5, ranks=2),
    Measured("7B, TP 2", settings("qwen25_7b", 8192, parallel=TP2), 81.7, ranks=2),
    Measured("1.5B VLM", settings("vlm_1_5b", 8192, tower=WINDOWS), 68.4, pictures=34),
    Measured("7B alignment", settings("vlm_7b", 8192, train=ALIGN), 40.2, pictures=34),
    Measured("1.5B alignment", settings("vlm_1_5b", 8192, train=ALIGN), 15.8, pictures=34),
)


def predicted_gib(row: Measured) -> float:
    """What the row should take."""
    found = predict(row.run, row.recompute, world_size=row.ranks, pictures=row.pictures)
    return found.total / GIB


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_what_was_measured(row: Measured) -> None:
    # All rows of a sequence are taken for trained ones; in alignment data few are.
    bar = 0.05 if "llm" in row.run.train.freeze else 0.015
    assert predicted_gib(row) == pytest.approx(row.peak_gib, rel=bar)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("1.5B, 8k", {"recompute": "selective"}),
        ("1.5B, selective", {"recompute": "full"}),
        ("1.5B, FP8", {"run": settings("qwen25_1_5b", 16384)}),
        ("1.5B, scores", {"run": settings("qwen25_1_5b", 8192)}),
        ("7B, 8k", {"ranks": 1}),
        ("7B, TP 2", {"run": settings("qwen25_7b", 8192)}),
        ("1.5B VLM", {"pictures": 31}),
        ("7B alignment", {"run": settings("vlm_7b", 8192)}),
    ],
)
def test_the_comparison_sees_what_is_left_out(name: str, changes: dict[str, Any]) -> None:
    (row,) = (row for row in ROWS if row.name == name)
    assert predicted_gib(replace(row, **changes)) != pytest.approx(row.peak_gib, rel=0.02)


class Pipeline:
    """What Megatron-Core's schedule asks of a pipeline's communicator."""

    def __init__(self, size: int, rank: int, chunks: int | None):
        self.pp_group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
        self.virtual_pipeline_model_parallel_size = chunks


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_each_stage_holds_what_the_schedule_warms_up(chunks: int, count: int, stages: int) -> None:
    chunks = chunks if stages > 1 else 1
    model = {"preset": "qwen25_7b", "llm": {"num_layers": 32}}
    parallel = {"pipeline": stages, "virtual_pipeline": chunks}
    run = settings(model, 4096, parallel=parallel, batch={"global_size": count})
    degrees = Degrees.of(run, world_size=stages)
    held = []
    for stage in range(stages):
        total, _, warm_up, _ = schedules.get_pp_rank_microbatches(
            count,
            chunks,
            stages,
            p2p_communicator=Pipeline(stages, stage, chunks if chunks > 1 else None),
        )
        held.append(32 // (stages * chunks) * min(warm_up + 1, total))
    assert [layers_held(run, degrees, stage) for stage in range(stages)] == held
    assert predict(run, "none", world_size=stages, pictures=0).layers in (
        layers * 4096 * 158_720 for layers in held
    )


def test_a_cut_model_needs_less_of_each_rank() -> None:
    whole = predict(settings("qwen25_7b", 4096), "none", world_size=1, pictures=0)
    for section in ({"tensor": 4}, {"pipeline": 4}, {"context": 4}):
        run = settings("qwen25_7b", 4096, parallel=section)
        part = predict(run, "none", world_size=4, pictures=0)
        assert part.total < 0.6 * whole.total, section


def test_the_tower_may_have_its_peak_alone() -> None:
    """Encoded again after the LLM's backward, its activations meet none of the LLM's."""
    again = {"backward": "recompute", "images_per_forward": 64}
    run = settings("vlm_1_5b", 4096, tower=again)
    few, many = (predict(run, "none", world_size=1, pictures=count) for count in (1, 200))
    assert few.pictures == 0 and few.layers > 0
    assert many.layers == 0 and many.pictures > 64 * 500_000_000
    assert many.total == predict(run, "none", world_size=1, pictures=64).total


@pytest.mark.parametrize(
    ("gib", "mode"), [(80, "none"), (70, "none"), (60, "selective"), (34, "full"), (24, "full")]
)
def test_the_fastest_that_fits_is_chosen(
    gib: int, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = settings("qwen25_1_5b", 16384)
    assert choose(run, gib * GIB, world_size=1, pictures=0) == mode
    assert ("out of memory is likely" in caplog.text) == (gib == 24)
    for name in MODES:
        need = predict(run, name, world_size=1, pictures=0).total
        assert f"{name} {need / GIB:.1f} GiB" in caplog.text


def test_the_share_that_is_planned_with_is_kept() -> None:
    run = settings("qwen25_1_5b", 16384)
    need = predict(run, "none", world_size=1, pictures=0).total
    assert choose(run, round(need / USABLE) + GIB // 100, world_size=1, pictures=0) == "none"
    assert choose(run, round(need / USABLE) - GIB // 100, world_size=1, pictures=0) == "selective"


def test_nothing_is_run_again_on_a_cpu() -> None:
    run = settings("qwen25_1_5b", 16384, train={"recompute": "auto", "precision": "fp32"})
    cpu: Any = torch.device("cpu")
    settled = settle_recompute(run, None, device=cpu, pictures=0)  # type: ignore[arg-type]
    assert settled.train.recompute == "none"
    assert settled == run.model_copy(
        update={"train": run.train.model_copy(update={"recompute": "none"})}
    )


@pytest.mark.parametrize(
    ("file", "train", "words"),
    [
        ("zero2.json", {"precision": "fp32"}, "train.precision=fp32"),
        ("zero3.json", {}, "ZeRO stage 3"),
        ("zero2_offload.json", {}, "an offloaded optimizer"),
        ("zero1.json", {}, None),
        ("zero2.json", {}, None),
    ],
)
def test_what_cannot_be_told_is_said(file: str, train: dict[str, Any], words: str | None) -> None:
    run = settings("qwen25_1_5b", 8192, train=train, deepspeed={"llm": str(DEEPSPEED / file)})
    why = unpredictable(run, world_size=1)
    assert why is None if words is None else words in str(why)


def test_without_a_count_all_that_fits_is_taken_for_pictures() -> None:
    run = settings("vlm_1_5b", 8192, tower={"window": 2}, batch={"global_size": 8})
    width = run.model.tokens_per_image
    assert most_pictures(run, world_size=1) == 2 * (8192 // width)
    assert most_pictures(run, world_size=4) == 2 * (8192 // width)
    whole_step = run.model_copy(update={"tower": run.tower.model_copy(update={"window": 0})})
    assert most_pictures(whole_step, world_size=4) == 2 * (8192 // width)
    assert most_pictures(whole_step, world_size=1) == 8 * (8192 // width)
    assert most_pictures(settings("qwen25_1_5b", 8192), world_size=1) == 0
