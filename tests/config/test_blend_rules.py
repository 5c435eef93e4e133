"""Rules of blended datasets: each names the field and the fix."""

import pytest

from ghostvis_mega.config.rules import find_problems
from ghostvis_mega.train.preflight import find_problems as preflight_problems


@pytest.fixture
def blended(make_run, make_dataset, tmp_path):
    """Build a run that blends `train.gvd` with `other.gvd`."""
    make_dataset(tmp_path / "other.gvd", samples=20)

    def _make(*overrides, entries=(("train", 4), ("other", 1))):
        listed = ", ".join(f"{{path: {tmp_path / n}.gvd, weight: {w}}}" for n, w in entries)
        return make_run(f"data.blend=[{listed}]", *overrides)

    return _make


def test_right_blends_have_no_problems(blended):
    for run in (
        blended(),
        blended("data.blend_unit=tokens", "data.blend_changes=[{step: 50, weights: [0, 2]}]"),
        blended(
            "data.blend_changes=[{step: 50, weights: [1, 1]}]", entries=(("train", 1), ("other", 0))
        ),
    ):
        assert preflight_problems(run, world_size=1, device="cpu") == []


CHANGES = "data.blend_changes="
WRONG = {
    "train left out": ([], (("other", 1),), "is not in data.blend", "or add it there"),
    "twice": ([], (("train", 1), ("train", 1)), "names", "Keep one entry"),
    "held-out": ([], (("train", 1), ("test", 1)), "trains on data.heldout", "Leave it out"),
    "no weight": ([], (("train", 0), ("other", 0)), "data.blend has no weight", "Raise one"),
    "never used": ([], (("train", 1), ("other", 0)), "data.blend[1]", "remove it"),
    "too few weights": (
        [CHANGES + "[{step: 5, weights: [1]}]"],
        None,
        "data.blend_changes[0].weights has 1 weights for the 2 datasets",
        "in the same order",
    ),
    "too late": (
        [CHANGES + "[{step: 100, weights: [1, 1]}]"],
        None,
        "data.blend_changes[0].step=100",
        "Use a smaller step",
    ),
    "not ascending": (
        [CHANGES + "[{step: 9, weights: [1, 1]}, {step: 5, weights: [1, 2]}]"],
        None,
        "has the steps [9, 5]",
        "list them ascending",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_blends_are_named(blended, name):
    overrides, entries, problem, fix = WRONG[name]
    run = blended(*overrides, **({} if entries is None else {"entries": entries}))
    found = find_problems(run, world_size=1, device="cpu")
    assert any(problem in text and fix in text for text in found), found


def test_changes_without_a_blend_are_refused(make_run):
    run = make_run(CHANGES + "[{step: 5, weights: [1]}]")
    (problem,) = find_problems(run, world_size=1, device="cpu")
    assert "data.blend_changes" in problem and "Fill data.blend" in problem


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokenizer": b"another"}, "was tokenised with another tokenizer than data.train"),
        ({"template": "plain"}, "uses the chat template plain"),
        ({"template": "plain-turns"}, "uses the chat template plain-turns"),
        ({"samples": 16}, "is a copy of data.train"),
        ({"trained_tokens": 0}, "has no trained token"),
    ],
)
def test_datasets_that_do_not_go_together(blended, make_dataset, tmp_path, changes, sentence):
    run = blended(entries=(("train", 1), ("third", 1)))
    make_dataset(tmp_path / "third.gvd", **({"samples": 30} | changes))
    if "samples" in changes:
        (tmp_path / "third.gvd" / "manifest.json").write_bytes(
            (tmp_path / "train.gvd" / "manifest.json").read_bytes()
        )
    found = preflight_problems(run, world_size=1, device="cpu")
    assert len(found) == 1 and sentence in found[0], found


def test_answers_and_all_turns_go_together(blended, make_dataset, tmp_path):
    run = blended(entries=(("train", 1), ("third", 1)))
    make_dataset(tmp_path / "third.gvd", samples=30, template="chatml-turns")
    assert preflight_problems(run, world_size=1, device="cpu") == []


def test_a_missing_dataset_is_named(blended):
    run = blended(entries=(("train", 1), ("nowhere", 1)))
    (problem,) = preflight_problems(run, world_size=1, device="cpu")
    assert problem.startswith("data.blend[1].path:") and "is not a directory" in problem
