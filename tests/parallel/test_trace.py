"""The record of calls sees all of them, equal ranks agree, and what differs is named."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from ghostvis_mega.parallel.trace_calls import TRACED
from ghostvis_mega.parallel.trace_compare import (
    Call,
    GroupInfo,
    Part,
    Record,
    Tally,
    first_difference,
    head_line,
    read_record,
)
from tests.launch import launch

pytestmark = [pytest.mark.world_size(4), pytest.mark.timeout(300)]

# Of ProcessGroup's methods, those that move nothing.
SILENT = {
    "abort",
    "boxed",
    "get_backend",
    "get_group_store",
    "get_reconfigure_handle",
    "merge_remote_group",
    "name",
    "new_window",
    "rank",
    "reconfigure",
    "set_timeout",
    "shutdown",
    "size",
    "split_group",
    "unbox",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trace")
    worker = Path(__file__).with_name("trace_worker.py")
    return launch(worker, ranks=4, timeout_s=240, folder=folder) | {"folder": str(folder)}


def test_groups_that_are_destroyed_leave_no_threads(seen: dict[str, Any]) -> None:
    """Else processes that go through many layouts grow slower with each."""
    before, first, between, second, after = seen["threads"]
    assert first == second
    # The default group starts some of its own when first used.
    assert between == after <= before + 10 < first - 20


def test_every_method_that_moves_data_is_traced() -> None:
    """A torch with a method of another name must not go unseen."""
    methods = {
        name
        for name, value in vars(ProcessGroup).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_")
    }
    hooks = {name for name in methods if "register" in name}
    assert methods - SILENT - hooks <= set(TRACED)
    assert len(methods & set(TRACED)) > 15


def test_as_many_calls_as_the_profiler_sees(seen: dict[str, Any]) -> None:
    traced, counted = seen["seen"]
    assert traced == counted
    assert traced > 20


@pytest.mark.parametrize("layout", ["zero3", "tp2-pp2"])
def test_all_calls_of_a_training_step_are_seen(seen: dict[str, Any], layout: str) -> None:
    traced, counted = seen["steps"][layout]
    assert traced == counted
    assert traced > 20


def test_nothing_is_noted_outside(seen: dict[str, Any]) -> None:
    assert seen["after"] == 0


def test_calls_say_what_they_do(seen: dict[str, Any]) -> None:
    assert {"world", "data", "tensor"} <= set(seen["labels"])
    text = "\n".join(seen["calls"])
    for part in (
        r"all_reduce of 8 float32 \(SUM\) \(trace_worker\.py:\d+\)",
        r"all_reduce of 8 float32 \(MAX\)",
        r"broadcast of 8 float32 \(root rank 2\)",
        r"all_to_all of float32",
        r"send of 8 float32 to rank 1",
        r"barrier",
    ):
        assert re.search(part, text), part


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "skip",
            r"Group data \[0, 2\], call 2: rank 0 made all_reduce of 20 float32 \(SUM\) "
            r"\(trace_worker\.py:\d+\); rank 2 made all_reduce of 30 float32",
        ),
        (
            "bucket",
            r"Group data \[1, 3\], call 2: rank 1 made all_reduce of 64 float32.*"
            r"rank 3 made all_reduce of 32 float32",
        ),
        (
            "swap",
            r"Ranks 0 and 1 take their groups in different orders: rank 0 made all_reduce of 5 "
            r"float32 \(SUM\) \(trace_worker\.py:\d+\) in group world \[0, 1, 2, 3\] where rank 1 "
            r"made .* in group tensor \[0, 1\]",
        ),
        (
            "swap_in_group",
            r"Group world \[0, 1, 2, 3\], call 1: ranks 1, 2, 3 made all_reduce of 5 float32 "
            r"\(SUM\).*; rank 0 made all_reduce of 5 float32 \(MAX\)",
        ),
        (
            "splits",
            r"Group world \[0, 1, 2, 3\], part 1 from rank 3 to rank 0: rank 3 sent 6 in "
            r"all_to_all of float32 .*; rank 0 expected 12 in all_to_all",
        ),
        (
            "message",
            r"part 1 from rank 1 to rank 0: rank 1 sent 9 float32 in send of 9 float32 to rank 0 "
            r".*; rank 0 expected 7 float32",
        ),
        ("absent", r"rank 2 did not come to comparison 1 within 0\.5 s of rank 0"),
    ],
)
def test_what_differs_is_named(seen: dict[str, Any], name: str, told: str) -> None:
    assert re.search(told, seen[name]), seen[name]


def read_whole_record(path: Path, *, rank: int) -> Record:
    record = read_record(path, rank=rank)
    assert record is not None
    return record


@pytest.mark.parametrize("name", ["skip", "bucket", "swap", "swap_in_group", "splits", "message"])
def test_the_files_of_a_dead_job_say_the_same(seen: dict[str, Any], name: str) -> None:
    files = [Path(seen["folder"]) / f"{name}{rank}.jsonl" for rank in range(4)]
    records = [read_whole_record(path, rank=rank) for rank, path in enumerate(files)]
    assert first_difference(records) == seen[name]
    # One rank alone has nobody to differ from.
    assert first_difference(records[:1]) is None


def test_a_line_cut_by_a_kill_is_left_out(seen: dict[str, Any], tmp_path: Path) -> None:
    text = (Path(seen["folder"]) / "skip0.jsonl").read_text()
    whole = len(text.splitlines())
    assert whole == 1 + 3
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text[:-20])
    assert len(read_whole_record(cut, rank=0).calls) == 3 - 1


def test_a_file_without_its_first_line_is_no_record(tmp_path: Path) -> None:
    path, line = tmp_path / "trace0.jsonl", head_line(12)
    for length in range(len(line) - 1):
        path.write_text(line[:length])
        assert read_record(path, rank=0) is None, line[:length]
    path.write_text(line)
    assert read_whole_record(path, rank=0).comparisons == 12


def make_record(rank: int, texts: list[str], *, start: int = 1) -> Record:
    """A rank of two that made `texts` and remembers those from `start` on."""
    calls = tuple(
        Call(at=n, group="g", number=n, what=text, place="here")
        for n, text in enumerate(texts, start=1)
        if n >= start
    )
    tally = Tally(len(texts), "/".join(texts))
    return Record(
        rank=rank,
        groups={"g": GroupInfo("data", (0, 1))},
        collectives={"g": tally},
        shared={1 - rank: tally},
        calls=calls,
    )


def test_a_rank_that_made_fewer_calls_is_named() -> None:
    message = first_difference([make_record(0, ["a", "b", "c"]), make_record(1, ["a", "b"])])
    assert message == (
        "Group data [0, 1], call 3: rank 0 made c (here); rank 1 made only 2 calls, "
        "and last of all b (here) in group data [0, 1]."
    )


def test_a_difference_that_is_no_longer_remembered_is_still_one() -> None:
    first, second = make_record(0, ["x", "b", "c"], start=2), make_record(1, ["a", "b", "c"])
    message = first_difference([first, second])
    assert message is not None
    assert "before the latest calls that are kept" in message
    assert "rank 0 3, rank 1 3" in message


def test_ranks_that_compared_unequally_often_are_not_compared() -> None:
    first = make_record(0, ["a"])
    message = first_difference([first, dataclasses.replace(make_record(1, ["b"]), comparisons=3)])
    assert message == (
        "The ranks stopped at different comparisons: rank 0 after 0, rank 1 after 3."
    )


def test_a_record_survives_json() -> None:
    record = dataclasses.replace(
        make_record(0, ["a"]),
        sent={"g>1": Tally(1, "d")},
        calls=(Call(1, "g", 1, "a", "here", sent=(Part(1, 1, "4"),)),),
    )
    assert Record.from_json(json.loads(json.dumps(dataclasses.asdict(record)))) == record
