"""Which DeepSpeed files the engines of a run are made from, and how long answers are cut."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghostvis_mega.config.deepspeed import engine_files
from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine import build
from ghostvis_mega.engine.decode import cut_length
from ghostvis_mega.parallel.plan import Degrees

MakeRun = Callable[..., RunConfig]
RUN = "examples/configs/vlm_tiny_easyvqa.yaml"


@pytest.fixture
def make_run() -> MakeRun:
    return lambda *overrides: load_run_config(RUN, overrides)


@pytest.mark.parametrize(
    "frozen", [[], ["llm"], ["vision", "resampler", "projector"], ["llm", "vision"]]
)
def test_an_engine_that_is_not_made_needs_no_file(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, frozen: list[str]
) -> None:
    """So what `check` accepts is what a run can be built from."""
    asked = []

    def resolve(path: Any, *, engine: str, **_: Any) -> SimpleNamespace:
        asked.append(engine)
        return SimpleNamespace(stage=1)

    run = make_run(f"train.freeze=[{', '.join(frozen)}]")
    module = torch.nn.Module()
    module.tower, module.resampler, module.projector = (torch.nn.Linear(2, 2) for _ in range(3))
    module.fused = None
    monkeypatch.setattr(build, "resolve_deepspeed", resolve)
    monkeypatch.setattr(build, "build_chunks", lambda *_, **__: [])
    monkeypatch.setattr(build, "build_encoder", lambda *_, **__: module)
    monkeypatch.setattr(build, "mark_pipeline_copy", lambda *_: None)
    for name in ("ZeroEngine", "hold_llm", "hold_vision", "LLMGrid", "WorldGrid"):
        monkeypatch.setattr(build, name, lambda *_, **__: object())
    parts = build.build_parts(run, SimpleNamespace(places=[0]), device=torch.device("cpu"))
    made = {"llm": parts.llm_engine, "vision": parts.vision_engine}
    assert set(asked) == set(engine_files(run)) == {n for n, e in made.items() if e is not None}


def degrees(**given: int) -> Degrees:
    one = dict.fromkeys(("world_size", "tensor", "pipeline", "virtual_pipeline", "context"), 1)
    return Degrees(**{**one, "data": 1, **given})


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("split", [{}, {"tensor": 2}, {"context": 2}, {"tensor": 4, "context": 2}])
def test_answers_have_a_length_that_fp8_takes(
    make_run: MakeRun, recipe: str, rows: int, split: dict[str, int]
) -> None:
    run = make_run("train.precision=bf16", f"train.fp8={recipe}")
    layout = degrees(**split)
    cut, unit = layout.context * layout.tensor, {"delayed": 16, "blockwise": 128}[recipe]
    for longest in (1, 37, 256):
        length = cut_length(longest, run=run, degrees=layout, rows=rows)
        assert length >= longest
        assert rows * length % (cut * unit) == 0 and length % layout.sequence_multiple == 0
        shorter = length - layout.sequence_multiple
        assert shorter < longest or rows * shorter % (cut * unit)


def test_answers_are_no_longer_than_bf16_needs(make_run: MakeRun) -> None:
    assert cut_length(37, run=make_run(), degrees=degrees(), rows=2) == 37
    assert cut_length(37, run=make_run(), degrees=degrees(context=2), rows=2) == 40
