"""A run that differs where it matters is refused in one sentence; other settings may change."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ghostvis_mega.checkpoint.layout import layout_of, layout_problem
from ghostvis_mega.parallel.plan import Degrees
from tests.parity import problem

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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parallel": {"tensor": 2}}, "parallel.tensor is 1 in the checkpoint and 2 here. Set p"),
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline is 1 in the checkpoint and 2 here"),
        ({"world_size": 2}, "world_size is 4 in the checkpoint and 2 here. Start 4 processes, or"),
        (
            {"stage": 3},
            "zero_stage.llm is 1 in the checkpoint and 3 here (also different: zero_stage.vision). "
            "Set deepspeed.llm to a file with zero_optimization.stage=1, or",
        ),
        (
            {"model": {"llm": {"num_layers": 8}}},
            "model.llm.num_layers is 4 in the checkpoint and 8",
        ),
        ({"model": {"vision": {"post_norm": True}}}, "model.vision.post_norm is false in"),
        (
            {"train": {"freeze": ["llm"]}},
            'train.freeze is [] in the checkpoint and ["llm"] here (also different: zero_stage.l',
        ),
        ({"train": {"precision": "bf16"}, "stage": 2}, "train.precision is fp32 in"),
        ({"batch": {"global_size": 16}}, "batch.global_size is 8 in the checkpoint and 16 here"),
        ({"model": {"vision": None, "connector": None}}, "model.vision is absent in"),
    ],
)
def test_what_differs_is_named_with_both_values_and_the_fix(
    tmp_path: Path, change: dict, says: str
):
    problem_text = layout_problem(PATH, saved=fields(tmp_path), here=fields(tmp_path, **change))
    assert problem_text is not None
    assert problem_text.startswith(f"{PATH} does not fit this run: {says}")
    assert problem_text.endswith("or checkpoint.resume=none to start anew.")
