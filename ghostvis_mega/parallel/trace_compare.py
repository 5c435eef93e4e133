"""Whether the ranks of a job made calls that fit together, and the first that does not.

Three things must hold, else a job hangs or computes nonsense: the members of a group make the same
collective calls in the same order; two ranks take their common groups in the same order; what one
rank sends another is what that one receives, part by part. Nothing here needs a process group, so
that the dumps of a job that hangs are compared in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class TraceMismatch(RuntimeError):
    """Ranks made calls that do not fit together; the message names them and the first such call."""


class Tally(NamedTuple):
    """A stream of calls in short."""

    count: int
    digest: str
    """Of all its calls, in order."""


NOTHING = Tally(0, "")


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


def first_difference(records: Sequence[Record]) -> str | None:
    """One or more sentences about the first calls that do not fit together; None if all do.

    Args:
        records: Of all ranks, or of those that left one; tallies decide, calls give the details.
    """
    ranks = {record.rank: record for record in records}
    groups = {name: info for record in records for name, info in record.groups.items()}
    found: list[tuple[float, str]] = []
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
    found.sort(key=lambda item: item[0])
    more = len(found) - 1
    tail = f" ({more} more {'difference' if more == 1 else 'differences'} follow.)" if more else ""
    return found[0][1] + tail


def _difference_in_group(
    name: str, info: GroupInfo, members: Sequence[Record]
) -> tuple[float, str]:
    """Where it is (calls since the start of the rank that is first there), and the sentence."""
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
            sides = [
                f"{_ranks(same)} {f'made {text}' if text else _none_made(same, counts)}"
                for text, same in _grouped(what)
            ]
            return at, f"Group {info}, call {number}: {'; '.join(sides)}."
    told = ", ".join(f"rank {rank} {count}" for rank, count in counts.items())
    return float("inf"), (
        f"Group {info}: the ranks made different calls ({told} in all), the first of them before "
        "the latest calls that are kept. Compare more often."
    )


def _none_made(ranks: Sequence[int], counts: Mapping[int, int]) -> str:
    return f"made only {counts[ranks[0]]} calls" if counts[ranks[0]] else "made no call"


def _grouped(what: Mapping[int, str | None]) -> list[tuple[str | None, list[int]]]:
    """Ranks by what they did, the majority first."""
    same: dict[str | None, list[int]] = {}
    for rank, text in what.items():
        same.setdefault(text, []).append(rank)
    return sorted(same.items(), key=lambda item: -len(item[1]))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"


def _difference_in_parts(
    name: str, info: GroupInfo, source: Record, target: Record
) -> tuple[float, str]:
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
        return at, (
            f"Group {info}, part {number} from rank {source.rank} to rank {target.rank}: rank "
            f"{source.rank} sent {left}; rank {target.rank} expected {right}."
        )
    return float("inf"), (
        f"Group {info}: what rank {source.rank} sent is not what rank {target.rank} expected, "
        "first before the latest calls that are kept. Compare more often."
    )


def _parts(record: Record, name: str, peer: int, side: str) -> dict[int, tuple[Part, Call]]:
    return {
        part.number: (part, call)
        for call in record.calls
        if call.group == name
        for part in getattr(call, side)
        if part.peer == peer
    }


def _difference_in_order(
    groups: Mapping[str, GroupInfo], one: Record, other: Record
) -> tuple[float, str]:
    """As `_difference_in_group`, for groups that two ranks share and take in another order."""
    common = {name for name, info in groups.items() if {one.rank, other.rank} <= set(info.ranks)}
    lists = [
        [call for call in record.calls if call.number and call.group in common]
        for record in (one, other)
    ]
    for first, second in zip(*lists, strict=False):
        if (first.group, first.number) != (second.group, second.number):
            return first.at, (
                f"Ranks {one.rank} and {other.rank} take their groups in different orders: rank "
                f"{one.rank} made {first} in group {groups[first.group]} where rank {other.rank} "
                f"made {second} in group {groups[second.group]}."
            )
    return float("inf"), (
        f"Ranks {one.rank} and {other.rank} took their groups in different orders before the "
        "latest calls that are kept. Compare more often."
    )
