"""2 steps, save, load into a new engine, 2 steps equals 4 steps: not one bit differs.

Four gloo ranks go through all layouts in one launch; each test looks at one of their results.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch

pytestmark = pytest.mark.world_size(4)

LAYOUTS = [
    "dp4 zero1",
    "tp2sp pp2 zero1",
    "pp2 interleaved zero2",
    "dp4 zero3, vision zero2",
    "tp2 zero0",
    "pp2 frozen llm",
    "pp2 frozen tower, untied",
    "tp2sp cp2 zero1",
    "tp2sp bf16 zero2",
    "dp4 bf16 zero3, vision zero2",
    "tp2sp pp2 zero1 offloaded",
    "tp2sp bf16 zero2 offloaded",
    "dp4 bf16 zero3 offloaded, vision zero2",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("worker.py")
    return launch(worker, ranks=4, timeout_s=270, folder=tmp_path_factory.mktemp("resume"))


def test_every_layout_was_run(results: dict[str, Any]):
    assert set(LAYOUTS) <= set(results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_the_same_run(results: dict[str, Any], layout: str):
    ranks = results[layout]
    assert len(ranks) == 4
    for rank in ranks:
        assert rank["path"]
        assert rank["state"] == [2, 16, {"note": layout}]
        assert rank["after_load"] == []
        assert rank["buffers_agree"]
        assert rank["draws"]
        assert rank["at_end"] == []
        uninterrupted, resumed = rank["losses"]
        assert resumed == uninterrupted


@pytest.mark.parametrize("layout", ["dp4 zero1", "tp2sp bf16 zero2 offloaded"])
def test_forgetting_any_part_of_the_optimizer_is_noticed(results: dict[str, Any], layout: str):
    noticed = dict(results[layout][0]["controls"])
    assert noticed.pop("nothing") is False
    assert len(noticed) >= 2
    assert all(noticed.values()), noticed


def test_one_flipped_byte_is_refused_on_all_ranks_before_it_is_used(results: dict[str, Any]):
    damage = results["damage"]
    assert len(set(damage["flipped"])) == 1
    assert damage["flipped"][0].startswith(f"{damage['file']} is damaged: its sha256 is ")
    assert damage["unchanged"] == [[], [], [], []]


def test_all_ranks_fall_back_to_the_checkpoint_before(results: dict[str, Any]):
    # The damaged one is neither used nor counted, nor deleted.
    assert results["damage"]["fallback"] == [[2, 2, 3, 4]] * 4


def test_a_run_that_trains_other_parts_is_refused_on_all_ranks(results: dict[str, Any]):
    (refusal,) = set(results["damage"]["layout"])
    assert "does not fit this run: model.connector.kind is perceiver_mlp in the che" in refusal
    assert "train.freeze" in refusal


def test_a_failed_save_fails_on_all_ranks(results: dict[str, Any]):
    (refusal,) = set(results["damage"]["write"])
    assert refusal.startswith("the checkpoint after step 1 could not be saved: ")
    assert "blocked" in refusal


def test_weights_alone_go_to_any_layout_and_back(results: dict[str, Any]):
    moved = results["weights alone"]
    assert moved["taken"] == [["llm", "vision", "projector"], ["llm"]]
    assert moved["partial"] == []
    assert moved["differing"] == [[], [], [], []]
    assert moved["buffers_agree"]
    assert not moved["moments"]
    uneven, interleaved, whole = moved["losses"]
    assert uneven == pytest.approx(whole, rel=1e-5)
    assert interleaved == pytest.approx(whole, rel=1e-5)


def test_optimizer_states_leave_the_host_and_come_to_it(results: dict[str, Any]):
    moved = results["host and back"]
    assert set(moved) == {"tp2sp pp2 zero1 offloaded", "dp4 zero3 offloaded, vision zero2"}
    for ranks in moved.values():
        assert ranks == [[[], True, True]] * 4


@pytest.mark.parametrize(
    ("layout", "bar"),
    [("tp2sp pp2 zero1", 1e-6), ("tp2sp bf16 zero2", 1e-4), ("dp4 bf16 zero3", 1e-4)],
)
def test_an_offloaded_run_is_the_same_run(results: dict[str, Any], layout: str, bar: float):
    rest = ", vision zero2" if "zero3" in layout else ""
    here, host = (results[f"{layout}{kind}{rest}"][0]["losses"][0] for kind in ("", " offloaded"))
    for pair in zip(here, host, strict=True):
        for mine, other in zip(*pair, strict=True):
            assert other == pytest.approx(mine, rel=bar)
    # The steps differ from each other by more than that.
    assert here[0][0] != pytest.approx(here[1][0], rel=bar)
