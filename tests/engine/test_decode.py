"""Greedy answers: one rank against a plain loop, and every layout against one rank."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch

pytestmark = pytest.mark.world_size(4)

WORKER = Path(__file__).with_name("decode_worker.py")
STOP_TOKEN = 102
ALONE = ["alone", "alone, in rounds of 2"]
TOGETHER = [
    "tp2 pp2",
    "tp2 pp2, in rounds of 2",
    "dp2 pp2",
    "dp2 pp2, in rounds of 2",
    "dp4 zero3",
    "cp2 dp2, in rounds of 2",
    "tp2 cp2",
    "pp2 cp2, in rounds of 2",
    "cp4",
]
LISTS = ["all", "other pictures", "one", "none"]


def answer(names: list[str], *, ranks: int, folder: Path) -> dict[str, Any]:
    args = [str(STOP_TOKEN), json.dumps(names)]
    return launch(WORKER, ranks=ranks, timeout_s=90, folder=folder, args=args)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answer(ALONE, ranks=1, folder=tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answer(TOGETHER, ranks=4, folder=tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("prompts", LISTS)
def test_answers_equal_a_plain_loop(alone: dict[str, Any], name: str, prompts: str) -> None:
    assert alone[name]["answers"][prompts] == alone[name]["plain"][prompts]


@pytest.mark.parametrize("name", TOGETHER)
def test_every_layout_answers_alike(
    alone: dict[str, Any], together: dict[str, Any], name: str
) -> None:
    assert together[name]["answers"] == alone["alone"]["answers"]
    assert together[name]["ranks_agree"]


def test_decoding_leaves_the_model_in_training_mode(
    alone: dict[str, Any], together: dict[str, Any]
) -> None:
    assert all(row["training"] for row in (alone | together).values())


def test_the_answers_can_tell_a_mistake(alone: dict[str, Any]) -> None:
    answers = alone["alone"]["answers"]
    shown, others = answers["all"], answers["other pictures"]
    assert answers["none"] == [] and answers["one"] == [shown[4]]
    assert alone["alone"]["unknown tokens too"] != shown
    # Answers differ between prompts, some stop early, and pictures decide where there are any.
    assert len({tuple(tokens) for tokens in shown}) == len(shown)
    lengths = {len(tokens) for tokens in shown}
    assert max(lengths) == 5 and min(lengths) < 5
    assert all(STOP_TOKEN not in tokens for tokens in shown)
    assert [a == b for a, b in zip(shown, others, strict=True)] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
