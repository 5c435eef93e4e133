"""A run that differs where it matters is refused in one sentence; other settings may change."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ghostvis_mega.checkpoint.layout import (
    layout_change,
    layout_of,
    layout_problem,
    model_differences,
    same_places,
)
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.certify import problem

pytestmark = pytest.mark.durability

PATH = Path("runs/a/checkpoints/step-00000010")


def fields(folder: Path, *, stage: int = 1, world_size: int = 4, **sections) -> dict:
    """Fields of a run, as its engine would have them."""
    run = problem.make_run(folder, stage=stage, **sections)
    llm, vision = SimpleNamespace(stage=stage), SimpleNamespace(stage=min(stage, 2))
    engines = [vision] if "llm" in run.train.freeze else [llm, vision]
    engine = SimpleNamespace(
        run=run,
        groups=SimpleNamespace(degrees=Degrees.of(run, world_size=world_size)),
        engines=engines,
        parts=SimpleNamespace(llm_engine=llm, vision_engine=vision),
    )
    return layout_of(engine)


def test_the_same_run_fits(tmp_path: Path):
    assert layout_problem(PATH, saved=fields(tmp_path), here=fields(tmp_path)) is None


def test_learning_rate_and_length_of_the_run_may_change(tmp_path: Path):
    here = fields(tmp_path, train={"steps": 99}, optim={"clip_norm": 2.0})
    assert layout_problem(PATH, saved=fields(tmp_path), here=here) is None


def test_a_checkpoint_from_before_there_was_padding_has_none(tmp_path: Path):
    saved, here = fields(tmp_path), fields(tmp_path)
    assert saved.pop("model.llm.vocab_padding") == 0
    assert layout_problem(PATH, saved=saved, here=here) is None
    here["model.llm.vocab_padding"] = 8
    problem_text = layout_problem(PATH, saved=saved, here=here)
    assert problem_text is not None
    assert "model.llm.vocab_padding is 0 in the checkpoint and 8 here" in problem_text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model": {"llm": {"num_layers": 8}}},
            "model.llm.num_layers is 4 in the checkpoint and 8",
        ),
        ({"model": {"vision": {"post_norm": True}}}, "model.vision.post_norm is false in"),
        (
            {"train": {"freeze": ["llm"]}},
            'train.freeze is [] in the checkpoint and ["llm"] here. Set train.freeze=[], or',
        ),
        ({"train": {"precision": "bf16"}, "stage": 2}, "train.precision is fp32 in"),
        ({"batch": {"global_size": 16}}, "batch.global_size is 8 in the checkpoint and 16 here"),
        ({"model": {"vision": None, "connector": None}}, "model.vision is absent in"),
        (
            {"data": {"augment": True}},
            "data.augment is false in the checkpoint and true here. Set ",
        ),
    ],
)
def test_what_differs_is_named_with_both_values_and_the_fix(
    tmp_path: Path, change: dict, says: str
):
    problem_text = layout_problem(PATH, saved=fields(tmp_path), here=fields(tmp_path, **change))
    assert problem_text is not None
    assert problem_text.startswith(f"{PATH} does not fit this run: {says}")
    assert problem_text.endswith("or checkpoint.resume=none to start anew.")


@pytest.mark.parametrize(
    ("change", "says", "same"),
    [
        ({"parallel": {"tensor": 2}}, "parallel.tensor 1 -> 2", False),
        ({"parallel": {"pipeline": 2, "first_stage_layers": 3}}, "layers absent -> 3", False),
        ({"world_size": 2}, "world_size 4 -> 2", False),
        ({"stage": 3}, "zero_stage.llm 1 -> 3, zero_stage.vision 1 -> 2", True),
        ({}, "", True),
    ],
)
def test_the_cut_may_change(tmp_path: Path, change: dict, says: str, same: bool):
    saved, here = fields(tmp_path), fields(tmp_path, **change)
    assert layout_problem(PATH, saved=saved, here=here) is None
    assert layout_change(saved, here).endswith(says)
    assert bool(layout_change(saved, here)) == bool(change)
    assert same_places(saved, here) == same


WHOLE = ("llm", "vision", "projector")
PERCEIVER = {"kind": "perceiver_mlp"}


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"llm": {"rope_base": 500000.0}}, "model.llm.rope_base=10000.0"),
        ({"llm": {"norm_eps": 1e-5}}, "model.llm.norm_eps=1e-06"),
        ({"llm": {"activation": "relu2"}}, "model.llm.activation=swiglu"),
        ({"llm": {"tied_embeddings": False}}, "model.llm.tied_embeddings=true"),
        ({"llm": {"qkv_bias": False}}, "model.llm.qkv_bias=true"),
        ({"llm": {"num_layers": 2}}, "model.llm.num_layers=4"),
        ({"llm": {"num_heads": 8}}, "model.llm.num_heads=4"),
        ({"llm": {"num_kv_heads": 1}}, "model.llm.num_kv_heads=2"),
        ({"vision": {"kind": "clip"}}, "model.vision.kind=siglip"),
        ({"vision": {"num_heads": 4}}, "model.vision.num_heads=2"),
        ({"vision": {"feature_layer": -2}}, "model.vision.feature_layer=-1"),
        ({"vision": {"post_norm": True}}, "model.vision.post_norm=false"),
        ({"vision": {"patch_size": 8}}, "model.vision.patch_size=4"),
        ({"connector": {"kind": "mlp"}}, "model.connector.kind=avgpool_mlp"),
    ],
)
def test_weights_of_a_model_that_computes_otherwise_are_told_apart(
    tmp_path: Path, change: dict, fix: str
):
    saved, here = fields(tmp_path), fields(tmp_path, model=change)
    (sentence,) = model_differences(saved=saved, here=here, modules=WHOLE)
    field, there = fix.split("=")
    assert sentence.startswith(f"{field} is {there} in the checkpoint and ")
    assert sentence.endswith(f" here. Set {fix}, or leave out checkpoint.weights.")


def test_every_field_that_differs_has_its_sentence(tmp_path: Path):
    change = {"llm": {"rope_base": 1.0}, "vision": {"post_norm": True}}
    saved, here = fields(tmp_path), fields(tmp_path, model=change)
    assert len(model_differences(saved=saved, here=here, modules=WHOLE)) == 2
    (only,) = model_differences(saved=saved, here=here, modules=("vision",))
    assert only.startswith("model.vision.post_norm")


@pytest.mark.parametrize(
    ("change", "modules"),
    [
        ({"train": {"seed": 9, "precision": "bf16"}, "stage": 2, "world_size": 2}, WHOLE),
        ({"model": {"llm": {"max_positions": 128, "init_std": 0.5}}}, WHOLE),
        # These show in the shapes, or in nothing that was trained.
        ({"model": {"vision": {"image_size": 32}}}, WHOLE),
        ({"model": {"connector": {"tokens_per_image": 1}}}, WHOLE),
        ({"model": {"connector": {"num_heads": 2, "num_layers": 5}}}, WHOLE),
        # Parts that are not taken over.
        ({"model": {"vision": None, "connector": None}}, ("llm",)),
        ({"model": {"llm": {"rope_base": 1.0}}}, ("vision", "projector")),
        ({"model": {"connector": PERCEIVER}}, ("llm", "vision")),
    ],
)
def test_weights_alone_go_where_they_mean_the_same(
    tmp_path: Path, change: dict, modules: tuple[str, ...]
):
    saved, here = fields(tmp_path), fields(tmp_path, **change)
    assert model_differences(saved=saved, here=here, modules=modules) == []
    assert model_differences(saved=here, here=saved, modules=modules) == []


def test_the_resampler_brings_its_heads_and_layers(tmp_path: Path):
    saved = fields(tmp_path, model={"connector": PERCEIVER})
    here = fields(tmp_path, model={"connector": {**PERCEIVER, "num_heads": 2, "num_layers": 1}})
    sentences = model_differences(saved=saved, here=here, modules=("resampler",))
    assert [s.split()[0] for s in sentences] == [
        "model.connector.num_layers",
        "model.connector.num_heads",
    ]


def test_a_checkpoint_that_does_not_name_a_field_is_not_taken_for_the_same(tmp_path: Path):
    here = fields(tmp_path)
    saved = {field: value for field, value in here.items() if field != "model.llm.rope_base"}
    (sentence,) = model_differences(saved=saved, here=here, modules=WHOLE)
    assert sentence.startswith("model.llm.rope_base is absent in the checkpoint and 10000.0 here.")
