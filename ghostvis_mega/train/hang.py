"""One report of a hang over all ranks, gathered through files in the run folder.

The store at which the ranks met lives in one of them, which may be the one that hangs; a folder
does not. Each rank that can still write leaves what it was doing, its calls to others and its
Python stacks; a rank that leaves nothing is stopped, dead or cut off, and the others name it.
"""

import faulthandler
import json
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ghostvis_mega.parallel.calls import CallWatch, GroupCalls, LastCall
from ghostvis_mega.utils.files import atomic_write
from ghostvis_mega.utils.launch import WAITS_FOR_OTHERS

REPORT = "report.txt"


@dataclass(frozen=True)
class RankState:
    """Where a rank is."""

    rank: int
    doing: str
    silent_s: float
    top: str
    """File of the innermost frame of the main thread."""
    last: LastCall | None
    groups: dict[str, GroupCalls]
    save: str | None = None
    """What the save is at that the main thread waits for; empty where that waits for other ranks,
    None where the main thread waits for no save."""

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        if self.save is not None:
            return not self.save
        return WAITS_FOR_OTHERS.search(self.top) is not None

    @property
    def line(self) -> str:
        """In one sentence."""
        text = f"rank {self.rank}: in {self.doing} for {self.silent_s:.0f} s"
        if self.save is not None:
            text += f", its save {self.save or 'waits for other ranks'}"
        if self.last is None:
            return f"{text}; no call to other ranks yet"
        number = f", call {self.last['number']}" if self.last["number"] else ""
        done = "returned" if self.last["returned"] else "not returned"
        return (
            f"{text}; last call: {self.last['what']} in group {self.last['group']}{number} "
            f"({self.last['place']}), {self.last['seconds']:.0f} s ago, {done}"
        )


def own_state(
    rank: int, *, doing: str, silent_s: float, calls: CallWatch | None, save: str | None = None
) -> RankState:
    """Where this process is; may be asked by any of its threads."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame) if frame is not None else []
    return RankState(
        rank=rank,
        doing=doing,
        silent_s=silent_s,
        top=stack[-1].filename if stack else "",
        last=None if calls is None else calls.last,
        groups={} if calls is None else calls.groups,
        save=save,
    )


def leave_state(folder: Path, state: RankState) -> None:
    """Write a rank's file: a line of JSON, then the stacks of all its threads."""
    folder.mkdir(parents=True, exist_ok=True)
    stacks = folder / f".stacks-{state.rank:05d}"
    with stacks.open("w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    stacks.unlink()
    head = json.dumps(asdict(state)).encode() + b"\n"
    atomic_write(folder / f"rank-{state.rank:05d}.txt", head + text)


def present(folder: Path) -> list[int]:
    """Ranks that have left their state."""
    return sorted(int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.txt"))


def gather(folder: Path, rank: int, world_size: int, *, wait_s: float) -> str | None:
    """Wait for the states of the others; the first rank that is there writes the report.

    Args:
        folder: Of this launch.
        rank: Of this process, whose own state is there.
        world_size: Ranks that should leave a state.
        wait_s: How long to wait for them.

    Returns:
        The report on the rank that wrote it, None on the others once it is there, or late.
    """
    end = time.monotonic() + wait_s
    while len(present(folder)) < world_size and time.monotonic() < end:
        time.sleep(0.1)
    if present(folder)[0] != rank:
        while not (folder / REPORT).exists() and time.monotonic() < end + wait_s:
            time.sleep(0.1)
        return None
    states, stacks = {}, {}
    for number in present(folder):
        head, _, rest = (folder / f"rank-{number:05d}.txt").read_text().partition("\n")
        states[number], stacks[number] = RankState(**json.loads(head)), rest
    text = report_of(states, stacks, world_size=world_size)
    atomic_write(folder / REPORT, text.encode())
    return text


def report_of(
    states: Mapping[int, RankState], stacks: Mapping[int, str], *, world_size: int
) -> str:
    """Who holds the others up, where every rank is, and all stacks."""
    silent = [rank for rank in range(world_size) if rank not in states]
    guilty, why = find_guilty(states, silent)
    lines = [f"hang: {_ranks(guilty)} {why}."]
    lines += [f"  {states[rank].line}" for rank in sorted(states)]
    lines += [
        f"  rank {rank}: no word; {_last_seen(rank, states)}stopped, dead or without the run folder"
        for rank in silent
    ]
    ordered = sorted(states, key=lambda rank: (rank not in guilty, rank))
    lines += [f"stacks of rank {rank}:\n{stacks[rank].rstrip()}" for rank in ordered]
    return "\n".join(lines) + "\n"


def find_guilty(states: Mapping[int, RankState], silent: list[int]) -> tuple[list[int], str]:
    """The ranks that others wait for and that wait for nobody, and how that is known."""
    if silent:
        return silent, "does not answer" if len(silent) == 1 else "do not answer"
    waits = {rank: _missing(state, states) for rank, state in states.items()}
    awaited = {other for missing in waits.values() for other in missing}
    behind = sorted(rank for rank in awaited if not waits[rank])
    if behind:
        return behind, "did not come to a call that others wait in"
    busy = sorted(rank for rank, state in states.items() if not state.waits)
    if busy and len(busy) < len(states):
        return busy, "computes, reads or writes while the others wait in a call"
    return sorted(states), "all wait for each other" if not busy else "are all at work"


def _missing(state: RankState, states: Mapping[int, RankState]) -> set[int]:
    """Members of a rank's groups that have made fewer of their calls."""
    found = set()
    for key, own in state.groups.items():
        for rank in own["ranks"]:
            theirs = states[rank].groups.get(key) if rank in states else None
            if rank in states and (theirs["calls"] if theirs else 0) < own["calls"]:
                found.add(rank)
    return found


def _last_seen(rank: int, states: Mapping[int, RankState]) -> str:
    """In which call of which group the others wait for a rank that is silent."""
    for state in states.values():
        last = state.last
        if last is None or last["returned"]:
            continue
        members = [own["ranks"] for own in state.groups.values() if own["label"] == last["group"]]
        if any(rank in ranks for ranks in members):
            return f"awaited in call {last['number']} of group {last['group']}; "
    return ""


def _ranks(numbers: list[int]) -> str:
    return f"rank {', '.join(map(str, numbers))}"
