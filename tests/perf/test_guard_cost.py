"""Guards ask nobody and wait for nothing that a step would not; if they did, it would count."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine import step as step_module
from ghostvis_mega.engine import zero as zero_module
from ghostvis_mega.parallel.calls import CallWatch
from ghostvis_mega.perf.fault_run import write_small_run
from ghostvis_mega.perf.guard_cost import GuardedSteps, HostReads, guarded_steps, measure_guards
from ghostvis_mega.train.guards import Guards

if TYPE_CHECKING:
    from ghostvis_mega.parallel.groups import Groups

pytestmark = pytest.mark.durability


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    folder = tmp_path_factory.mktemp("guards")
    path = write_small_run(folder / "small", cuda=False, processes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it
        yield load_run_config(path, ["guards.spike=skip", f"log.output={folder}/run"])


@pytest.fixture(scope="module")
def calls() -> Iterator[CallWatch]:
    with CallWatch() as watch:
        yield watch


@pytest.fixture(scope="module")
def steps(run: RunConfig, groups: "Groups", calls: CallWatch) -> Iterator[GuardedSteps]:
    with guarded_steps(run, groups, device=torch.device("cpu"), calls=calls) as taken:
        taken.pair()
        taken.fill_window()
        yield taken


def test_guards_add_no_read_and_no_call(steps: GuardedSteps) -> None:
    for _ in range(4):  # batches with and without pictures
        pair = steps.pair(counted=True)
        assert pair.guarded == pair.plain
        reads, called = pair.guarded
        assert reads > 0 and called > 0
    assert steps.left_out == 0


def test_a_check_that_waits_for_its_answer_is_counted(steps: GuardedSteps) -> None:
    honest = step_module.not_finite

    def waits(tensors: Any, *, device: torch.device) -> torch.Tensor:
        found = honest(tensors, device=device)
        return torch.ones(()) if found.item() else found

    # A guarded step makes both places call what `step` has.
    with mock.patch.object(step_module, "not_finite", waits):
        pair = steps.pair(counted=True)
    assert pair.guarded[0] > pair.plain[0]
    assert step_module.not_finite is zero_module.not_finite is honest


def test_a_guard_that_asks_the_others_is_counted(steps: GuardedSteps) -> None:
    honest = Guards.accept

    def asks(guards: Guards, loss: float) -> bool:
        dist.all_reduce(torch.tensor(loss))
        return honest(guards, loss)

    with mock.patch.object(Guards, "accept", asks):
        pair = steps.pair(counted=True)
    assert pair.guarded[1] == pair.plain[1] + 1
    assert pair.guarded[0] == pair.plain[0]


def test_every_way_to_wait_for_a_number_counts_once() -> None:
    number = torch.ones(())
    with HostReads() as reads:
        number.item(), number.tolist(), bool(number), float(number), int(number), number.cpu()
        number + number, torch.isfinite(number).any().float()
    assert reads.count == 6


def test_rows_with_their_bars(
    run: RunConfig, groups: "Groups", calls: CallWatch, tmp_path: Path
) -> None:
    told: list[str] = []
    rows = measure_guards(
        run, groups, device=torch.device("cpu"), calls=calls, steps=3, progress=told.append
    )
    by_name = {row["name"]: row for row in rows}
    share = by_name["time in guards, share of a step"]
    assert 0 < share["value"] < 0.5 and share["bar"] is None  # a step of milliseconds
    for name in ("more reads with guards", "more calls with guards"):
        assert (by_name[name]["value"], by_name[name]["ok"]) == (0, True)
    with mock.patch("ghostvis_mega.perf.guard_cost._LEAST_STEP_S", 0.0):
        again = measure_guards(
            run, groups, device=torch.device("cpu"), calls=calls, steps=2, progress=told.append
        )
    assert next(row for row in again if row["name"] == share["name"])["bar"] == 0.005
    assert "pair 3 of 3" in told
