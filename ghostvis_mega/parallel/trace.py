"""A record of every call this rank makes to other ranks, to be compared with those of the others.

While a `CollectiveTrace` is open, the methods of torch's `ProcessGroup` are wrapped: the narrowest
place that all Python callers pass, ours, DeepSpeed's and Megatron-Core's alike. Closed, nothing is
left of it. What C++ calls by itself (functional collectives, Transformer Engine's userbuffers) is
not seen; nothing here uses those.

A trace of any length takes little memory: a rolling digest for each stream of calls, and the
latest calls in full. A file beside it holds the calls since the last comparison, so that ranks that
hang, abort or are killed leave behind what they did.
"""

import dataclasses
import datetime
import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.trace_calls import TRACED, caller, describe_call
from ghostvis_mega.parallel.trace_compare import (
    Call,
    GroupInfo,
    Part,
    Record,
    Stream,
    TraceMismatch,
    first_difference,
    head_line,
    line_of,
    tallies,
)


class CollectiveTrace:
    """Records while used as a context manager; one at a time in a process.

    Args:
        rank: Global rank of this process.
        labels: Names for groups, by torch's name of the group; others go by their description.
        keep: Calls to remember in full.
        path: Takes the calls since the last comparison; None writes nothing.
    """

    _open: "CollectiveTrace | None" = None

    def __init__(
        self,
        *,
        rank: int,
        labels: dict[str, str] | None = None,
        keep: int = 4096,
        path: Path | None = None,
    ):
        self.rank, self.labels = rank, dict(labels or {})
        self.num_calls = 0
        self.comparisons = 0
        self._calls: deque[Call] = deque(maxlen=keep)
        self._groups: dict[str, GroupInfo] = {}
        self._collectives: defaultdict[str, Stream] = defaultdict(Stream)
        self._shared: defaultdict[int, Stream] = defaultdict(Stream)
        self._sent: defaultdict[str, Stream] = defaultdict(Stream)
        self._received: defaultdict[str, Stream] = defaultdict(Stream)
        self._originals: dict[str, Any] = {}
        self._file = path.open("w", buffering=1) if path is not None else None
        self._begin_file()
        # Backward passes on a GPU call from autograd's own threads.
        self._lock = threading.Lock()

    def __enter__(self) -> "CollectiveTrace":
        if CollectiveTrace._open is not None:
            raise RuntimeError("another CollectiveTrace is open in this process: close it first")
        CollectiveTrace._open = self
        for name in TRACED:
            if name in ProcessGroup.__dict__:
                self._originals[name] = ProcessGroup.__dict__[name]
                setattr(ProcessGroup, name, self._wrapped(name, getattr(ProcessGroup, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(ProcessGroup, name, original)
        self._originals.clear()
        CollectiveTrace._open = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wrapped(self, name: str, original: Callable) -> Callable:
        """`ProcessGroup.NAME` that notes each call before it is made: a rank that hangs in it has
        noted it."""

        def call(group: ProcessGroup, *args: Any, **keywords: Any) -> Any:
            self._note(name, group, (*args, *keywords.values()))
            return original(group, *args, **keywords)

        call.__name__ = name
        return call

    def _note(self, name: str, group: ProcessGroup, args: tuple[Any, ...]) -> None:
        key, place = group.group_name, caller()
        with self._lock:
            if key not in self._groups:
                ranks = tuple(dist.get_process_group_ranks(group))
                label = self.labels.get(key) or group.group_desc.lower().removesuffix("_group")
                self._groups[key] = GroupInfo(label, ranks)
            ranks = self._groups[key].ranks
            call = describe_call(name, args, ranks)
            number = 0
            if call.collective:
                number = self._collectives[key].add(call.what)
                for rank in ranks:
                    if rank != self.rank:
                        self._shared[rank].add(f"{key} {call.what}")
            self.num_calls += 1
            noted = Call(
                self.num_calls,
                key,
                number,
                call.what,
                place,
                sent=self._parts(self._sent, key, call.sent),
                received=self._parts(self._received, key, call.received),
            )
            self._calls.append(noted)
            if self._file is not None:
                self._file.write(line_of(noted, self._groups[key]))

    def _parts(
        self, streams: defaultdict[str, Stream], key: str, amounts: Sequence[tuple[int, str]]
    ) -> tuple[Part, ...]:
        return tuple(
            Part(peer, streams[f"{key}>{peer}"].add(amount), amount) for peer, amount in amounts
        )

    def record(self, *, with_calls: bool = True) -> Record:
        """What this rank has done so far."""
        with self._lock:
            return Record(
                rank=self.rank,
                comparisons=self.comparisons,
                groups=dict(self._groups),
                collectives=tallies(self._collectives),
                shared=tallies(self._shared),
                sent=tallies(self._sent),
                received=tallies(self._received),
                calls=tuple(self._calls) if with_calls else (),
            )

    def check(self, store: dist.Store, *, world_size: int, timeout_s: float) -> None:
        """Compare with all ranks, which must call this between the same two steps.

        It goes through the store, not through the groups: ranks that are out of step would take
        each other's messages. What was found equal is then forgotten but for its digests.

        Args:
            store: One that all ranks reach.
            world_size: Number of ranks.
            timeout_s: How long a rank may be behind.

        Raises:
            TraceMismatch: On all ranks, naming the ranks and the first call that differs.
        """
        self.comparisons += 1
        records = self._exchange(store, "tallies", world_size, timeout_s, with_calls=False)
        if first_difference(records) is not None:
            records = self._exchange(store, "calls", world_size, timeout_s, with_calls=True)
            raise TraceMismatch(first_difference(records))
        if self.comparisons > 1:
            # Everybody has read them: all have come this far.
            store.delete_key(f"tallies/{self.comparisons - 1}/{self.rank}")
        with self._lock:
            self._calls.clear()
            self._begin_file()

    def _begin_file(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(head_line(self.comparisons))

    def _exchange(
        self, store: dist.Store, kind: str, world_size: int, timeout_s: float, *, with_calls: bool
    ) -> list[Record]:
        own = dataclasses.asdict(self.record(with_calls=with_calls))
        store.set(f"{kind}/{self.comparisons}/{self.rank}", json.dumps(own))
        keys = [f"{kind}/{self.comparisons}/{rank}" for rank in range(world_size)]
        try:
            store.wait(keys, datetime.timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise TraceMismatch(
                f"rank {', '.join(map(str, absent))} did not come to comparison {self.comparisons} "
                f"within {timeout_s:g} s of rank {self.rank}; it is still in an earlier call."
            ) from None
        return [Record.from_json(json.loads(store.get(key))) for key in keys]


def trace_store() -> dist.Store:
    """A store for comparisons: the one that all ranks of the default group met at."""
    return dist.PrefixStore(
        "ghostvis-trace",
        dist.distributed_c10d._get_default_store(),
    )


def group_labels(groups: Groups) -> dict[str, str]:
    """Our names of the groups of a layout."""
    named = {field.name: getattr(groups, field.name) for field in dataclasses.fields(groups)}
    return {
        group.group_name: name for name, group in named.items() if isinstance(group, ProcessGroup)
    }
