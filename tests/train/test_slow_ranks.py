"""A slow rank is named with its section; a rank with more work is not."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghostvis_mega.config.schema import GuardsConfig
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.windows import PictureWindow
from ghostvis_mega.train.slow_ranks import SECTIONS, SlowRank, SlowRanks, find_slow, work_of
from tests.launch import launch

pytestmark = pytest.mark.durability

RANKS = 4
PLACES = tuple(Place(data=rank, pipeline=0, tensor=0) for rank in range(RANKS))
FACTOR = GuardsConfig().slow_rank_factor
SECONDS = {"data": 0.05, "vision": 0.08, "llm": 0.3, "exchange": 0.03}


class Fleet:
    """Ranks whose time in a section is a fixed part and one in proportion to the work, with noise
    as of a busy machine."""

    def __init__(self, tmp_path, *, fixed: float = 0.3):
        settings = GuardsConfig()
        self.window, self.fixed = settings.slow_rank_window, fixed
        self.ranks = [
            SlowRanks(settings, places=PLACES, rank=rank, folder=tmp_path) for rank in range(RANKS)
        ]
        self.draw = random.Random(4)

    def step(self, step: int, *, images: list[int], slowed: dict[tuple[int, str], float]) -> list:
        told = [rank.tell(step) for rank in self.ranks]
        found = [rank.judge(told, step=step) for rank in self.ranks]
        assert all(verdict == found[0] for verdict in found)
        for number, rank in enumerate(self.ranks):
            if not rank.measures(step):
                continue
            work = {"data": 1 + images[number], "vision": 1 + images[number], "llm": 8192.0}
            work["exchange"] = 1 + 2 * images[number]
            own = {}
            for name, seconds in SECONDS.items():
                scale = 1.0 if name == "llm" else work[name] / 10
                own[name] = seconds * (self.fixed + (1 - self.fixed) * scale)
                own[name] *= 1 + abs(self.draw.gauss(0, 0.1)) + 3 * (self.draw.random() < 0.05)
                own[name] *= slowed.get((number, name), 1.0)
            rank.note(own, work)
        return found[0]


def run(fleet: Fleet, *, more: int = 1, slowed=None, since: int = 0, steps: int = 500) -> list:
    """(step, verdict) of a run in which rank 1 has `more` times the pictures of the others."""
    found = []
    for step in range(steps):
        images = [fleet.draw.randint(6, 12) for _ in range(RANKS)]
        images[1] *= more
        now = (slowed or {}) if step >= since else {}
        found += [(step, slow) for slow in fleet.step(step, images=images, slowed=now)]
    return found


@pytest.mark.parametrize("fixed", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("more", [1, 4])
def test_nobody_is_named_in_500_steps(tmp_path, more: int, fixed: float) -> None:
    assert run(Fleet(tmp_path, fixed=fixed), more=more) == []
    assert not list(tmp_path.iterdir())


def test_without_regard_to_work_the_busy_rank_would_be_named(tmp_path, monkeypatch) -> None:
    fleet = Fleet(tmp_path, fixed=0.0)
    for rank in fleet.ranks:
        note = rank.note
        monkeypatch.setattr(
            rank, "note", lambda own, work, note=note: note(own, dict.fromkeys(work, 1.0))
        )
    assert {slow.rank for _, slow in run(fleet, more=4)} == {1}


@pytest.mark.parametrize("since", [100, 103, 109, 111, 119])
@pytest.mark.parametrize(("section", "name"), SECTIONS.items())
def test_a_rank_three_times_slower_is_named_within_two_windows(
    tmp_path, section: str, name: str, since: int
) -> None:
    fleet = Fleet(tmp_path)
    steps = since + 2 * fleet.window + 1
    found = run(fleet, slowed={(2, section): 3.0}, since=since, steps=steps)
    assert {(slow.rank, slow.section) for _, slow in found} == {(2, name)}
    assert found[0][0] <= since + 2 * fleet.window
    assert found[0][1].factor > FACTOR
    lines = (tmp_path / "slow_ranks.jsonl").read_text().splitlines()
    assert len(lines) == len(found)


def test_little_time_is_no_reason_for_a_name() -> None:
    told = [(0.004, 1, 0.1, 1, 0.3, 1, 0.0, 1)] + [(0.001, 1, 0.1, 1, 0.3, 1, 0.0, 1)] * 3
    assert find_slow(told, PLACES, factor=FACTOR) == []
    told[0] = (0.2, 1, *told[0][2:])
    assert find_slow(told, PLACES, factor=FACTOR) == [SlowRank(0, "data", pytest.approx(200))]


def test_stages_of_a_pipeline_are_compared_among_themselves() -> None:
    places = tuple(Place(data=n // 2, pipeline=n % 2, tensor=0) for n in range(4))
    told = [(0.0, 1, 0.0, 1, 0.1 + 0.9 * (n % 2), 1, 0.0, 1) for n in range(4)]
    assert find_slow(told, places, factor=FACTOR) == []
    told[0] = (0.0, 1, 0.0, 1, 0.4, 1, 0.0, 1)
    assert find_slow(told, places, factor=FACTOR) == [SlowRank(0, "LLM", pytest.approx(4))]
    assert find_slow(told[:2], places[:2], factor=FACTOR) == [], "nobody to compare with"


def test_work_is_counted_in_every_layout() -> None:
    places = tuple(
        Place(data=0, pipeline=stage, tensor=rank) for stage in range(2) for rank in range(2)
    )
    dispatch = dispatch_images([[1, 2, 3, 4, 5, 6]], places)
    window = PictureWindow(1, dispatch, torch.zeros(0, 3, 4, 4, dtype=torch.uint8))
    step: Any = SimpleNamespace(windows=[window, window], micro_batches=[])
    works = [work_of(step, places=places, rank=rank) for rank in range(4)]
    assert [work["vision"] for work in works] == [1 + 2 * load for load in dispatch.loads]
    # Only the first stage reads pictures.
    read = [work["exchange"] - work["vision"] for work in works]
    assert read == [12, 12, 0, 0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("slow_worker.py")
    return launch(worker, ranks=2, timeout_s=250, folder=tmp_path_factory.mktemp("slow"))


@pytest.mark.world_size(2)
def test_real_waits_name_nobody(measured: dict[str, Any]) -> None:
    assert measured["balanced"] == []
    assert measured["more pictures"] == []


@pytest.mark.world_size(2)
def test_a_training_run_names_who_is_slow_in_what_and_nobody_else(measured: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in measured["training"].splitlines()]
    found = [(row["step"], row["rank"], row["section"]) for row in rows]
    assert {(rank, section) for _, rank, section in found} == {
        (1, "tower"), (0, "LLM"), (1, "data"), (0, "comm"),
    }  # fmt: skip
    for phase, section in enumerate(("tower", "LLM", "data", "comm"), 1):
        steps = [step for step, _, name in found if name == section]
        # In the first verdict after a whole window, and until the end of the phase.
        assert steps == [20 * phase + 10, 20 * phase + 20]


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("layout", "slow"), [("tp2", (1, "LLM")), ("pp2", (0, "tower")), ("cp2", (0, "LLM"))]
)
def test_runs_of_other_layouts_come_to_a_verdict(
    measured: dict[str, Any], layout: str, slow: tuple[int, str]
) -> None:
    rows = [json.loads(line) for line in measured[layout].splitlines()]
    assert [(row["step"], (row["rank"], row["section"])) for row in rows] == [(10, slow)]
