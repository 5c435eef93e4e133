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
import hashlib
import json
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.trace_compare import (
    Call,
    GroupInfo,
    Part,
    Record,
    Tally,
    TraceMismatch,
    call_from_json,
    first_difference,
)

_PASSED_OVER = (
    "torch/distributed/",
    "deepspeed/comm/",
    "contextlib.py",
    "typing_extensions.py",
    "ghostvis_mega/parallel/trace.py",
    "ghostvis_mega/utils/launch.py",
)
"""Files whose lines say nothing about why a call was made."""
_REDUCTIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")

# How a method says what it moves: (name in messages, position of the tensors that are alike on all
# members). Names of several torch versions; a trace takes those that this one has.
_COLLECTIVES: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce_coalesced", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather_coalesced", 0),
    "_allgather_base": ("all_gather_into_tensor", 0),
    "all_gather_single": ("all_gather_into_tensor", 0),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor_coalesced", 0),
    "all_gather_single_coalesced": ("all_gather_into_tensor_coalesced", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 1),
    "reduce_scatter_single": ("reduce_scatter_tensor", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor_coalesced", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter_tensor_coalesced", 1),
    "gather": ("gather", 1),
    "gather_single": ("gather_into_tensor", 1),
    "gather_into_tensor": ("gather_into_tensor", 1),
    "scatter": ("scatter", 0),
}
_EXCHANGES = ("alltoall", "alltoall_base", "all_to_all_single")
_BARRIERS = ("barrier", "monitored_barrier")
_SENDS = ("send",)
_RECEIVES = ("recv", "recv_anysource")
TRACED = (*_COLLECTIVES, *_EXCHANGES, *_BARRIERS, *_SENDS, *_RECEIVES)
"""Methods of `ProcessGroup` that move data or wait for others."""


class _Stream:
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
        self._rounds = 0
        self._calls: deque[Call] = deque(maxlen=keep)
        self._groups: dict[str, GroupInfo] = {}
        self._collectives: defaultdict[str, _Stream] = defaultdict(_Stream)
        self._shared: defaultdict[int, _Stream] = defaultdict(_Stream)
        self._sent: defaultdict[str, _Stream] = defaultdict(_Stream)
        self._received: defaultdict[str, _Stream] = defaultdict(_Stream)
        self._originals: dict[str, Any] = {}
        self._file = path.open("w", buffering=1) if path is not None else None
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
        key = group.group_name
        place = _caller()
        with self._lock:
            if key not in self._groups:
                ranks = tuple(dist.get_process_group_ranks(group))
                label = self.labels.get(key) or group.group_desc.lower().removesuffix("_group")
                self._groups[key] = GroupInfo(label, ranks)
            ranks = self._groups[key].ranks
            if name in _SENDS or name in _RECEIVES:
                self._note_message(name, key, ranks, args, place)
                return
            sent: Sequence[str] = ()
            received: Sequence[str] = ()
            if name in _BARRIERS:
                what = "barrier"
            elif name in _EXCHANGES:
                what = f"all_to_all of {_dtypes(_tensors(args[0]))}"
                received, sent = _exchanged(name, args, size=len(ranks))
            else:
                shown, position = _COLLECTIVES[name]
                tensors = _tensors(args[position])
                sizes = "+".join(str(tensor.numel()) for tensor in tensors)
                what = f"{shown} of {sizes} {_dtypes(tensors)}{_options(args, ranks)}"
            number = self._collectives[key].add(what)
            for rank in ranks:
                if rank != self.rank:
                    self._shared[rank].add(f"{key} {what}")
            self._append(
                key,
                number,
                what,
                place,
                sent=self._parts(self._sent, key, zip(ranks, sent, strict=False)),
                received=self._parts(self._received, key, zip(ranks, received, strict=False)),
            )

    def _note_message(
        self, name: str, key: str, ranks: Sequence[int], args: tuple[Any, ...], place: str
    ) -> None:
        tensors = _tensors(args[0])
        amount = f"{'+'.join(str(tensor.numel()) for tensor in tensors)} {_dtypes(tensors)}"
        if name == "recv_anysource":
            self._append(key, 0, f"recv of {amount} from any rank", place)
            return
        peer = ranks[args[1]]
        if name in _SENDS:
            parts = self._parts(self._sent, key, [(peer, amount)])
            self._append(key, 0, f"send of {amount} to rank {peer}", place, sent=parts)
        else:
            parts = self._parts(self._received, key, [(peer, amount)])
            self._append(key, 0, f"recv of {amount} from rank {peer}", place, received=parts)

    def _append(
        self,
        key: str,
        number: int,
        what: str,
        place: str,
        *,
        sent: tuple[Part, ...] = (),
        received: tuple[Part, ...] = (),
    ) -> None:
        self.num_calls += 1
        call = Call(self.num_calls, key, number, what, place, sent, received)
        self._calls.append(call)
        if self._file is not None:
            line = {"group": self._groups[key], "call": call}
            self._file.write(json.dumps(line, default=dataclasses.asdict) + "\n")

    def _parts(
        self, streams: defaultdict[str, _Stream], key: str, amounts: Iterable[tuple[int, str]]
    ) -> tuple[Part, ...]:
        return tuple(
            Part(peer, streams[f"{key}>{peer}"].add(amount), amount) for peer, amount in amounts
        )

    def record(self, *, with_calls: bool = True) -> Record:
        """What this rank has done so far."""
        with self._lock:
            return Record(
                rank=self.rank,
                groups=dict(self._groups),
                collectives=_tallies(self._collectives),
                shared=_tallies(self._shared),
                sent=_tallies(self._sent),
                received=_tallies(self._received),
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
        self._rounds += 1
        records = self._exchange(store, "tallies", world_size, timeout_s, with_calls=False)
        if first_difference(records) is not None:
            records = self._exchange(store, "calls", world_size, timeout_s, with_calls=True)
            raise TraceMismatch(first_difference(records))
        if self._rounds > 1:
            # Everybody has read them: all have come this far.
            store.delete_key(f"tallies/{self._rounds - 1}/{self.rank}")
        with self._lock:
            self._calls.clear()
            if self._file is not None:
                self._file.seek(0)
                self._file.truncate()

    def _exchange(
        self, store: dist.Store, kind: str, world_size: int, timeout_s: float, *, with_calls: bool
    ) -> list[Record]:
        own = dataclasses.asdict(self.record(with_calls=with_calls))
        store.set(f"{kind}/{self._rounds}/{self.rank}", json.dumps(own))
        keys = [f"{kind}/{self._rounds}/{rank}" for rank in range(world_size)]
        try:
            store.wait(keys, datetime.timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise TraceMismatch(
                f"rank {', '.join(map(str, absent))} did not come to comparison {self._rounds} "
                f"within {timeout_s:g} s of rank {self.rank}; it is still in an earlier call."
            ) from None
        return [Record.from_json(json.loads(store.get(key))) for key in keys]


def read_record(path: Path, *, rank: int) -> Record:
    """What a rank has left in its file, however it ended: its calls since the last comparison.

    Tallies count these alone, so only records of one comparison's time fit together.
    """
    calls: list[Call] = []
    groups: dict[str, GroupInfo] = {}
    for line in path.read_text().splitlines():
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            break  # the rank was killed while it wrote its last line
        call = call_from_json(data["call"])
        groups[call.group] = GroupInfo(data["group"]["label"], tuple(data["group"]["ranks"]))
        calls.append(call)
    return record_of(calls, groups, rank=rank)


def record_of(calls: Sequence[Call], groups: dict[str, GroupInfo], *, rank: int) -> Record:
    """A record whose tallies count the given calls."""
    collectives, shared, sent, received = (defaultdict(_Stream) for _ in range(4))
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
        groups=groups,
        collectives=_tallies(collectives),
        shared=_tallies(shared),
        sent=_tallies(sent),
        received=_tallies(received),
        calls=tuple(calls),
    )


def _tallies(streams: Mapping[Any, _Stream]) -> dict[Any, Tally]:
    return {key: stream.tally() for key, stream in streams.items()}


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


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an argument: one, a list, or a list of lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]


def _dtypes(tensors: Sequence[torch.Tensor]) -> str:
    names = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return "+".join(names) or "nothing"


def _options(args: tuple[Any, ...], ranks: Sequence[int]) -> str:
    """The reduction or the root, as they stand in the options or by themselves."""
    told = []
    for option in args[1:]:
        reduction = option if isinstance(option, dist.ReduceOp) else None
        reduction = getattr(option, "reduceOp", reduction)
        if reduction is not None:
            known = (name for name in _REDUCTIONS if reduction == getattr(dist.ReduceOp, name))
            told.append(next(known, "another reduction"))
        if hasattr(option, "rootRank"):
            told.append(f"root rank {ranks[option.rootRank]}")
    return f" ({', '.join(told)})" if told else ""


def _exchanged(name: str, args: tuple[Any, ...], *, size: int) -> tuple[list[str], list[str]]:
    """Elements from and to each rank of an all-to-all."""
    output, given = args[0], args[1]
    if name == "alltoall":
        return [str(part.numel()) for part in output], [str(part.numel()) for part in given]
    amounts = []
    for tensor, splits in ((output, args[2]), (given, args[3])):
        rows = tensor.shape[0] if tensor.dim() else 1
        width = tensor.numel() // rows if rows else 0
        amounts.append([str(n * width) for n in splits or [rows // size] * size])
    return amounts[0], amounts[1]


def _caller() -> str:
    """The line that makes the call, and the line of ours that led there."""
    frame = sys._getframe(3)
    first = ours = ""
    while frame is not None and not ours:
        path = frame.f_code.co_filename
        if not any(part in path for part in _PASSED_OVER):
            place = f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}"
            first = first or place
            if "ghostvis_mega/" in path:
                ours = place
        frame = frame.f_back
    return first if ours in ("", first) else f"{first}, from {ours}"
