"""What FP8 needs is told before a GPU is touched."""

import pytest

from ghostvis_mega.config.rules_precision import fp8_notes, fp8_problems
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.leak import leak_run


def problems(*, device: str = "cuda", **sections: dict) -> list[str]:
    given = leak_run(precision="bf16", fp8="delayed").model_dump(mode="json")
    for name, values in sections.items():
        given[name] = given[name] | values
    return list(fp8_problems(RunConfig.model_validate(given), device=device))


def notes(recipe: str, *, packing: bool = True, align: int | None = None, context: int = 1) -> str:
    given = leak_run(precision="bf16", fp8=recipe).model_dump(mode="json")
    given["data"] |= {"packing": packing, "segment_align": align}
    given["parallel"] |= {"context": context}
    return " ".join(fp8_notes(RunConfig.model_validate(given)))


def test_packs_whose_samples_share_scales_are_noted() -> None:
    assert "use train.fp8=delayed" in notes("tensorwise")
    assert "use train.fp8=delayed" in notes("tensorwise", align=128)
    assert "data.segment_align=128 " in notes("blockwise")
    assert "data.segment_align=128 " in notes("blockwise", align=64)
    assert "data.segment_align=256 " in notes("blockwise", align=128, context=2)


def test_packs_without_leaks_are_not_noted() -> None:
    for recipe in ("none", "delayed"):
        assert notes(recipe) == ""
    for recipe in ("tensorwise", "blockwise"):
        assert notes(recipe, packing=False) == ""
    assert notes("blockwise", align=128) == notes("blockwise", align=384) == ""
    assert notes("blockwise", align=256, context=2) == ""


def test_a_fitting_run_has_no_problem() -> None:
    assert problems() == []
    assert problems(train={"fp8": "none", "precision": "fp32"}, device="cpu") == []


@pytest.mark.parametrize(
    ("sections", "device", "said"),
    [
        ({"train": {"precision": "fp32"}}, "cuda", "train.precision=fp32"),
        ({}, "cpu", "needs a GPU"),
        ({"data": {"seq_length": 1000}}, "cuda", "Use data.seq_length=1008"),
        ({"train": {"fp8": "blockwise"}, "data": {"seq_length": 1040}}, "cuda", "seq_length=1152"),
        ({"parallel": {"tensor": 32}}, "cuda", "num_kv_heads x head_dim / parallel.tensor = 8"),
    ],
)
def test_each_rule_names_the_field_and_the_fix(sections: dict, device: str, said: str) -> None:
    found = problems(device=device, **sections)
    assert any(said in problem for problem in found), found
