"""Whether the ranks of a job made calls that fit together, and the first that does not.

Three things must hold, else a job hangs or computes nonsense: the members of a group make the same
collective calls in the same order; two ranks take their common groups in the same order; what one
rank sends another is what that one receives, part by part. Nothing here needs a process group, so
that the dumps of a job that hangs are compared in the same way.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class TraceMismatch(RuntimeError):
    """Ranks made calls that do not fit together; the message names them and the first such call."""


class Tally(NamedTuple):
    """A stream of calls in short."""

    count: int
    digest: str
    """Of all its calls, in order."""


NOTHING = Tally(0, "")


class Stream:
    """A count and a rolling digest."""

    __slots__ = ("count", "_digest")

    def __init__(self) -> None:
        self.count = 0
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, text: str) -> int:
        """Take one call; returns its number, from 1."""
        self.count += 1
        self._digest.update(f"{text}\n".encode())
        return self.count

    def tally(self) -> Tally:
        return Tally(self.count, self._digest.hexdigest())


@dataclass(frozen=True)
class Part:
    """What one rank gives another in one call: a send, or a row of an all-to-all."""

    peer: int
    """Global rank of the other."""
    number: int
    """Counted from 1 in the stream from the one rank to the other, in this group."""
    what: str


@dataclass(frozen=True)
class Call:
    """One call of one rank; numbers count from 1."""

    at: int
    """Among all calls of this rank."""
    group: str
    """Name that all members know the group by."""
    number: int
    """Among this rank's collective calls in the group; 0 for a send or receive."""
    what: str
    """Operation, elements, dtype, and the reduction or root."""
    place: str
    """Who called, outermost last."""
    sent: tuple[Part, ...] = ()
    received: tuple[Part, ...] = ()

    def __str__(self) -> str:
        return f"{self.what} ({self.place})"


@dataclass(frozen=True)
class GroupInfo:
    """A process group."""

    label: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.ranks[:16])) + (", ..." if len(self.ranks) > 16 else "")
        return f"{self.label} [{shown}]"


@dataclass(frozen=True)
class Record:
    """What one rank tells the others: tallies of everything, and its latest calls."""

    rank: int
    comparisons: int = 0
    """With the other ranks, so far."""
    groups: Mapping[str, GroupInfo] = field(default_factory=dict)
    collectives: Mapping[str, Tally] = field(default_factory=dict)
    """By group."""
    shared: Mapping[int, Tally] = field(default_factory=dict)
    """Collective calls of all groups that another rank is in, by that rank."""
    sent: Mapping[str, Tally] = field(default_factory=dict)
    """By `GROUP>RANK`."""
    received: Mapping[str, Tally] = field(default_factory=dict)
    """By `GROUP>RANK`."""
    calls: tuple[Call, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Record":
        """The inverse of `dataclasses.asdict` and JSON."""

        def tallies(section: Mapping[str, Any]) -> dict[str, Tally]:
            return {name: Tally(*value) for name, value in section.items()}

        return cls(
            rank=data["rank"],
            comparisons=data["comparisons"],
            groups={
                name: GroupInfo(info["label"], tuple(info["ranks"]))
                for name, info in data["groups"].items()
            },
            collectives=tallies(data["collectives"]),
            shared={int(rank): tally for rank, tally in tallies(data["shared"]).items()},
            sent=tallies(data["sent"]),
            received=tallies(data["received"]),
            calls=tuple(call_from_json(row) for row in data["calls"]),
        )


def call_from_json(row: Mapping[str, Any]) -> Call:
    """The inverse of `dataclasses.asdict` and JSON."""
    parts = {key: tuple(Part(**part) for part in row[key]) for key in ("sent", "received")}
    return Call(**{**row, **parts})


def head_line(comparisons: int) -> str:
    """First line of a rank's file."""
    return json.dumps({"comparisons": comparisons}) + "\n"


def line_of(call: Call, group: GroupInfo) -> str:
    """A call as a line of a rank's file; written at every call, so it is a plain list."""
    parts = [
        [(part.peer, part.number, part.what) for part in side]
        for side in (call.sent, call.received)
    ]
    values = (call.at, call.group, call.number, call.what, call.place)
    return json.dumps([group.label, group.ranks, *values, *parts]) + "\n"


def read_record(path: Path, *, rank: int) -> Record | None:
    """What a rank has left in its file, however it ended: its calls since the last comparison.

    Tallies count these alone, so only records after the same comparison fit together. None where
    the rank ended before its first line was whole: nobody knows which comparison it had come to.
    """
    calls: list[Call] = []
    groups: dict[str, GroupInfo] = {}
    head, *lines = path.read_text().splitlines() or [""]
    try:
        comparisons = json.loads(head)["comparisons"]
    except json.JSONDecodeError:
        return None
    for line in lines:
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            break  # the rank was killed while it wrote its last line
        label, ranks, *values, sent, received = data
        call = Call(
            *values,
            sent=tuple(Part(*part) for part in sent),
            received=tuple(Part(*part) for part in received),
        )
        groups[call.group] = GroupInfo(label, tuple(ranks))
        calls.append(call)
    return _record_of(calls, groups, rank=rank, comparisons=comparisons)


def _record_of(
    calls: Sequence[Call], groups: dict[str, GroupInfo], *, rank: int, comparisons: int
) -> Record:
    """A record whose tallies count the given calls."""
    collectives, shared, sent, received = (defaultdict(Stream) for _ in range(4))
    for call in calls:
        if call.number:
            collectives[call.group].add(call.what)
            for peer in groups[call.group].ranks:
                if peer != rank:
                    shared[peer].add(f"{call.group} {call.what}")
        for streams, parts in ((sent, call.sent), (received, call.received)):
            for part in parts:
                streams[f"{call.group}>{part.peer}"].add(part.what)
    return Record(
        rank=rank,
        comparisons=comparisons,
        groups=groups,
        collectives=tallies(collectives),
        shared=tallies(shared),
        sent=tallies(sent),
        received=tallies(received),
        calls=tuple(calls),
    )


def tallies(streams: Mapping[Any, Stream]) -> dict[Any, Tally]:
    return {key: stream.tally() for key, stream in streams.items()}


_Found = tuple[float, int, str]


def first_difference(records: Sequence[Record]) -> str | None:
    """One or more sentences about the first calls that do not fit together; None if all do.

    Args:
        records: Of all ranks, or of those that left one; tallies decide, calls give the details.
    """
    if len({record.comparisons for record in records}) > 1:
        done = ", ".join(f"rank {record.rank} after {record.comparisons}" for record in records)
        return f"The ranks stopped at different comparisons: {done}."
    ranks = {record.rank: record for record in records}
    groups = {name: info for record in records for name, info in record.groups.items()}
    # (calls before it, ranks that lack it, sentence): where one rank goes on alone, the call that
    # it left out is the cause, and what it met alone the consequence.
    found: list[_Found] = []
    for name, info in groups.items():
        members = [ranks[rank] for rank in info.ranks if rank in ranks]
        if len({member.collectives.get(name, NOTHING) for member in members}) > 1:
            found.append(_difference_in_group(name, info, members))
    for record in records:
        for key, tally in record.sent.items():
            name, _, peer = key.partition(">")
            other = ranks.get(int(peer))
            if other is not None and other.received.get(f"{name}>{record.rank}", NOTHING) != tally:
                found.append(_difference_in_parts(name, groups[name], record, other))
        for key in record.received:
            name, _, peer = key.partition(">")
            other = ranks.get(int(peer))
            if other is not None and f"{name}>{record.rank}" not in other.sent:
                found.append(_difference_in_parts(name, groups[name], other, record))
    if not found:
        # Only where each group by itself is sound can two of them have changed places.
        found = [
            _difference_in_order(groups, one, other)
            for one in records
            for other in records
            if one.rank < other.rank
            and one.shared.get(other.rank, NOTHING) != other.shared.get(one.rank, NOTHING)
        ]
    if not found:
        return None
    found.sort(key=lambda item: item[:2])
    more = len(found) - 1
    tail = f" ({more} more {'difference' if more == 1 else 'differences'} follow.)" if more else ""
    return found[0][2] + tail


def _difference_in_group(name: str, info: GroupInfo, members: Sequence[Record]) -> _Found:
    """Calls of the rank that is first there, number of ranks that lack it, and the sentence."""
    calls = {
        member.rank: {call.number: call for call in member.calls if call.group == name}
        for member in members
    }
    counts = {member.rank: member.collectives.get(name, NOTHING).count for member in members}
    start = max(
        [min(kept) for kept in calls.values() if kept]
        + [counts[rank] + 1 for rank, kept in calls.items() if not kept and counts[rank]]
        + [1]
    )
    for number in range(start, max(counts.values()) + 1):
        here = {rank: kept.get(number) for rank, kept in calls.items()}
        what = {rank: str(call) if call else None for rank, call in here.items()}
        if len(set(what.values())) > 1:
            at = min(call.at for call in here.values() if call)
            sides = [f"{_ranks(same)} made {text}" for text, same in _grouped(what) if text]
            absent = [member for member in members if here[member.rank] is None]
            sides += [_none_made(member, counts[member.rank]) for member in absent]
            return at, len(absent), f"Group {info}, call {number}: {'; '.join(sides)}."
    told = ", ".join(f"rank {rank} {count}" for rank, count in counts.items())
    text = (
        f"Group {info}: the ranks made different calls ({told} in all), the first of them before "
        "the latest calls that are kept. Compare more often."
    )
    return float("inf"), 0, text


def _none_made(member: Record, count: int) -> str:
    made = f"made only {count} calls" if count else "made no call"
    if not member.calls:
        return f"rank {member.rank} {made}"
    last = member.calls[-1]
    return f"rank {member.rank} {made}, and last of all {last} in group {member.groups[last.group]}"


def _grouped(what: Mapping[int, str | None]) -> list[tuple[str | None, list[int]]]:
    """Ranks by what they did, the majority first."""
    same: dict[str | None, list[int]] = {}
    for rank, text in what.items():
        same.setdefault(text, []).append(rank)
    return sorted(same.items(), key=lambda item: -len(item[1]))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"


def _difference_in_parts(name: str, info: GroupInfo, source: Record, target: Record) -> _Found:
    """As `_difference_in_group`, for what `source` sends `target`."""
    sent = _parts(source, name, target.rank, "sent")
    received = _parts(target, name, source.rank, "received")
    for number in sorted(sent.keys() | received.keys()):
        given, taken = sent.get(number), received.get(number)
        if given and taken and given[0].what == taken[0].what:
            continue
        left, right = (
            f"{part.what} in {call}" if part and call else "nothing"
            for part, call in (given or (None, None), taken or (None, None))
        )
        at = min(call.at for _, call in filter(None, (given, taken)))
        text = (
            f"Group {info}, part {number} from rank {source.rank} to rank {target.rank}: rank "
            f"{source.rank} sent {left}; rank {target.rank} expected {right}."
        )
        return at, int(not taken) + int(not given), text
    text = (
        f"Group {info}: what rank {source.rank} sent is not what rank {target.rank} expected, "
        "first before the latest calls that are kept. Compare more often."
    )
    return float("inf"), 0, text


def _parts(record: Record, name: str, peer: int, side: str) -> dict[int, tuple[Part, Call]]:
    return {
        part.number: (part, call)
        for call in record.calls
        if call.group == name
        for part in getattr(call, side)
        if part.peer == peer
    }


def _difference_in_order(groups: Mapping[str, GroupInfo], one: Record, other: Record) -> _Found:
    """As `_difference_in_group`, for groups that two ranks share and take in another order."""
    common = {name for name, info in groups.items() if {one.rank, other.rank} <= set(info.ranks)}
    lists = [
        [call for call in record.calls if call.number and call.group in common]
        for record in (one, other)
    ]
    for first, second in zip(*lists, strict=False):
        if (first.group, first.number) != (second.group, second.number):
            text = (
                f"Ranks {one.rank} and {other.rank} take their groups in different orders: rank "
                f"{one.rank} made {first} in group {groups[first.group]} where rank {other.rank} "
                f"made {second} in group {groups[second.group]}."
            )
            return first.at, 0, text
    text = (
        f"Ranks {one.rank} and {other.rank} took their groups in different orders before the "
        "latest calls that are kept. Compare more often."
    )
    return float("inf"), 0, text
