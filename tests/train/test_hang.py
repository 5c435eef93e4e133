"""A rank that stops answering or stays behind is named, with all stacks, soon enough."""

import threading
from pathlib import Path

import pytest

from ghostvis_mega.parallel.calls import GroupCalls
from ghostvis_mega.train.hang import RankState, find_guilty
from tests.launch import RankError, launch

pytestmark = pytest.mark.durability

WORKER = Path(__file__).with_name("hang_worker.py")
TIMEOUT_S = 10.0
SLACK_S = 5.0


def hang(case: str, *, ranks: int, folder: Path) -> tuple[RankError, str, float]:
    """How the launch ends, the report, and seconds from the hang to the report."""
    with pytest.raises(RankError) as caught:
        launch(WORKER, ranks=ranks, timeout_s=250, folder=folder, args=[case])
    (report,) = folder.rglob("report.txt")
    seconds = report.stat().st_mtime - float((folder / "began").read_text())
    return caught.value, report.read_text(), seconds


@pytest.mark.world_size(2)
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path) -> None:
    error, report, seconds = hang("stopped", ranks=2, folder=tmp_path)
    assert error.hung and error.code != 0
    assert TIMEOUT_S <= seconds <= TIMEOUT_S + SLACK_S
    first, *lines = report.splitlines()
    assert first == "hang: rank 1 does not answer."
    assert lines[0].startswith("  rank 0: in step 4 for 1")
    assert "last call: allreduce of 2 int64 in group world, call" in lines[0]
    assert "damage.py" in lines[0] and "not returned" in lines[0]
    assert lines[1].startswith("  rank 1: no word; awaited in call ")
    assert "stacks of rank 0:" in report and "in agree_before_step" in report
    # The others leave by themselves; the launcher need not wait for its own time limit.
    assert "rank 0 of 2 ended with 70" in str(error)


@pytest.mark.world_size(3)
def test_a_rank_that_stays_behind_is_named_through_those_that_wait(tmp_path: Path) -> None:
    error, report, seconds = hang("stuck", ranks=3, folder=tmp_path)
    assert error.hung
    assert TIMEOUT_S <= seconds <= TIMEOUT_S + SLACK_S
    first, *lines = report.splitlines()
    assert first == "hang: rank 1 did not come to a call that others wait in."
    assert "allreduce of 4 float32 in group default_pg, call 4" in lines[0]
    assert "allreduce of 4 float32 in group default_pg, call 3" in lines[1]
    assert "allreduce of 4 float32 in group pair, call 4" in lines[2]
    for rank in range(3):
        assert f"stacks of rank {rank}:" in report
    assert report.index("stacks of rank 1:") < report.index("stacks of rank 0:")
    assert "in reads_for_ever" in report


def state(
    rank: int,
    *,
    top: str = "x/torch/distributed/c10d.py",
    save: str | None = None,
    **calls: int,
) -> RankState:
    """Groups by their members, such as r01=3; a main thread that awaits a save is in threading."""
    top = top if save is None else threading.__file__
    groups = {
        name: GroupCalls(label=name, ranks=[int(digit) for digit in name[1:]], calls=count)
        for name, count in calls.items()
    }
    return RankState(rank, doing="step 1", silent_s=9, top=top, last=None, groups=groups, save=save)


CASES = {
    "silent": ([state(0, r012=4), state(2, r012=4)], [1], [1]),
    "behind": ([state(0, r01=4), state(1, r01=3)], [], [1]),
    "behind a chain": ([state(0, r02=4), state(1, r12=2), state(2, r02=3, r12=3)], [], [1]),
    "no call yet": ([state(0, r01=1), state(1)], [], [1]),
    "busy": ([state(0, r01=4), state(1, r01=4, top="feed.py")], [], [1]),
    "in a save": ([state(0, save=""), state(1, save="writes x"), state(2, save="")], [], [1]),
    "a save and a step": ([state(0, save=""), state(1, top="feed.py"), state(2)], [], [1]),
    "all wait in a save": ([state(0, save=""), state(1, save="")], [], [0, 1]),
    "all wait": ([state(0, r01=4), state(1, r01=4)], [], [0, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_who_holds_the_others_up(case: str) -> None:
    states, silent, expected = CASES[case]
    assert find_guilty({s.rank: s for s in states}, silent)[0] == expected
