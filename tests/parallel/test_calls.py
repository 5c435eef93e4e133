"""What a rank calls is counted, its waits are timed, and nothing stays behind."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from ghostvis_mega.parallel.calls import CallWatch
from ghostvis_mega.utils.timing import SectionTimer


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    """A default group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_calls_are_counted_by_group_and_the_last_is_known(world: dist.ProcessGroup) -> None:
    before = dict(ProcessGroup.__dict__), Work.__dict__["wait"]
    other = dist.new_group([0], group_desc="other")
    with CallWatch() as watch:
        assert watch.last is None
        dist.all_reduce(torch.zeros(7))
        dist.broadcast(torch.zeros(3, dtype=torch.int64), src=0, group=other)
        dist.all_reduce(torch.zeros(2, 2), group=other)
        watch.labels = {world.group_name: "world"}
        groups = {calls["label"]: calls["calls"] for calls in watch.groups.values()}
        assert groups == {"world": 1, "other": 2}
        last = watch.last
        assert last is not None
        assert (last["what"], last["group"]) == ("allreduce of 4 float32", "other")
        assert (last["number"], last["returned"]) == (2, True)
        assert last["place"].startswith("test_calls.py:")
        with ThreadPoolExecutor(1) as background:
            background.submit(dist.all_reduce, torch.zeros(9), group=other).result()
    dist.all_reduce(torch.zeros(7), group=other)
    assert watch.last is not None and watch.last["number"] == 2
    assert before == (dict(ProcessGroup.__dict__), Work.__dict__["wait"])


def test_a_wait_belongs_to_its_section_and_counts_once(
    world: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    allreduce = ProcessGroup.allreduce

    def slow(group: ProcessGroup, *args: object) -> Work:
        time.sleep(0.05)
        return allreduce(group, *args)

    monkeypatch.setattr(ProcessGroup, "allreduce", slow)
    timer = SectionTimer(torch.device("cpu"))
    with CallWatch() as watch:
        with timer.section("llm"):
            dist.all_reduce(torch.zeros(1))
        assert timer.read().keys() == {"llm"} and timer.waits == {}
        watch.waiting = timer.waiting
        with timer.section("llm"):
            time.sleep(0.02)
            dist.all_reduce(torch.zeros(1))
        with timer.section("vision"):
            time.sleep(0.02)
        seconds = timer.read()
    assert timer.waits.keys() == {"llm"}
    assert 0.05 <= timer.waits["llm"] <= seconds["llm"] - 0.02
