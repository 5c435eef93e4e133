"""Which samples share a pack. Arithmetic on lengths; no file is touched.

`balanced` is longest-processing-time first into a fixed number of bins, each then filled up with
what was held back for that, and best-fit repair: as full as best-fit decreasing, but packs look
alike (images, squared lengths), which is what data-parallel ranks wait for.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.data.completion import complete, hold_back
from ghostvis_mega.data.order import hash_u64

SLACK, PLAIN_SLACK = 0.001, 0.003
"""Share of bins more than the lower bound that `balanced` starts with; the second one where nothing
is held back."""

_ORDER_KEY = 1
_BIN_BITS = 32
_SMALL_GROUP = 64
_BUCKETS_FROM = 32
"""Units a possible load from which whole buckets of bins are filled at once."""


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths as two arrays: list i is values[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray  # int64 [lists + 1]
    values: np.ndarray  # int64

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Ragged":
        """From Python lists."""
        counts = np.fromiter((len(part) for part in lists), dtype=np.int64, count=len(lists))
        total = int(counts.sum())
        values = np.fromiter((v for part in lists for v in part), dtype=np.int64, count=total)
        return cls(np.concatenate([[0], np.cumsum(counts)]), values)

    @classmethod
    def singles(cls, values: np.ndarray) -> "Ragged":
        """Lists of one value each."""
        return cls(np.arange(len(values) + 1), values)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """Length of each list."""
        return np.diff(self.offsets)

    def take(self, order: np.ndarray) -> "Ragged":
        """The lists of these numbers, in this order."""
        counts = self.counts[order]
        ends = np.cumsum(counts)
        steps = np.repeat(self.offsets[order] - (ends - counts), counts)
        steps += np.arange(len(steps))
        return Ragged(np.concatenate([[0], ends]), self.values[steps])

    def lists(self) -> list[list[int]]:
        """As Python lists."""
        values, ends = self.values.tolist(), self.offsets.tolist()
        return [values[start:end] for start, end in zip(ends, ends[1:], strict=False)]


class _FreeSpace:
    """Bins by free size, with best fit in one shift of a bit set of the sizes that occur."""

    def __init__(self) -> None:
        self._bins: dict[int, list[int]] = defaultdict(list)
        self._occupied = 0

    def add(self, number: int, free: int) -> None:
        """Register a bin."""
        if not self._bins[free]:
            self._occupied |= 1 << free
        self._bins[free].append(number)

    def take(self, size: int) -> tuple[int, int] | None:
        """Remove and return (bin, free) with the least free space that holds `size`."""
        candidates = self._occupied >> size
        if not candidates:
            return None
        free = size + (candidates & -candidates).bit_length() - 1
        bins = self._bins[free]
        number = bins.pop()
        if not bins:
            self._occupied &= ~(1 << free)
        return number, free


def make_units(lengths: np.ndarray, groups: np.ndarray, *, limit: int, seed: int) -> Ragged:
    """Chunks of samples of one group, each at most `limit` long (or one sample), evenly filled.

    Args:
        lengths: int64 [samples].
        groups: int64 [samples], not negative; equal numbers want to share a pack.
    """
    noise = np.argsort(hash_u64(np.arange(len(lengths)), seed, _ORDER_KEY), kind="stable")
    order = noise[np.argsort(groups[noise], kind="stable")]
    ordered, sizes = groups[order], lengths[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(order)))
    totals = np.add.reduceat(sizes, starts)
    targets = totals / -(-totals // limit)
    cuts = np.zeros(len(order), dtype=bool)
    _cut_small(cuts, sizes, starts, counts, targets, limit)
    for group in np.flatnonzero(counts > _SMALL_GROUP).tolist():
        part = slice(int(starts[group]), int(starts[group] + counts[group]))
        cuts[part] = _cut_one(sizes[part].tolist(), float(targets[group]), limit)
    return Ragged(np.append(np.flatnonzero(cuts), len(order)), order)


def _cut_one(sizes: list[int], target: float, limit: int) -> list[bool]:
    """Where a new unit begins inside of one group."""
    cuts, size = [], target
    for length in sizes:
        cut = size + length > limit or size >= target
        size = length if cut else size + length
        cuts.append(cut)
    return cuts


def _cut_small(
    cuts: np.ndarray,
    sizes: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    targets: np.ndarray,
    limit: int,
) -> None:
    """The same for all small groups side by side, one sample of each at a time; in place."""
    groups = np.flatnonzero(counts <= _SMALL_GROUP)
    groups = groups[np.argsort(-counts[groups], kind="stable")]  # those left are a prefix
    starts, counts, targets = starts[groups], counts[groups], targets[groups]
    size = targets.copy()  # full, so that the first sample begins a unit
    for place in range(int(counts[0]) if len(counts) else 0):
        left = int(np.searchsorted(-counts, -place, side="left"))
        length = sizes[starts[:left] + place]
        cut = (size[:left] + length > limit) | (size[:left] >= targets[:left])
        size[:left] = np.where(cut, length, size[:left] + length)
        cuts[starts[:left] + place] = cut


def pack_balanced(lengths: np.ndarray, units: Ragged, *, capacity: int, seed: int) -> Ragged:
    """Longest unit first into the emptiest of about ceil(total / capacity) packs; some short units
    wait and fill the packs up (`completion`); rest best-fit.

    Lengths of few values may not add up to what is left. So if that took more packs than placing
    all longest first begins with, this is tried as well and taken unless it needs more.

    Returns:
        Packs of sample numbers; every sample of `units` once; no pack longer than `capacity`.
    """
    sizes = np.add.reduceat(lengths[units.values], units.offsets[:-1])
    noise = np.argsort(hash_u64(np.arange(len(units)), seed, _ORDER_KEY), kind="stable")
    order = noise[np.argsort(-sizes[noise], kind="stable")]
    units, sizes = units.take(order), sizes[order]
    held = hold_back(sizes, order, capacity=capacity, seed=seed)
    first = _count(sizes, SLACK, capacity)
    packs = _pack(lengths, units, sizes, held, count=first, capacity=capacity, seed=seed)
    plain = _count(sizes, PLAIN_SLACK, capacity)
    if len(packs) > plain:
        nothing = np.zeros_like(held)
        other = _pack(lengths, units, sizes, nothing, count=plain, capacity=capacity, seed=seed)
        packs = min(other, packs, key=len)
    return packs


def _count(sizes: np.ndarray, slack: float, capacity: int) -> int:
    return max(1, -(-int(sizes.sum() * (1 + slack)) // capacity))


def _pack(
    lengths: np.ndarray,
    units: Ragged,
    sizes: np.ndarray,
    held: np.ndarray,
    *,
    count: int,
    capacity: int,
    seed: int,
) -> Ragged:
    """Units of descending sizes into `count` packs and, for what is left over, some more."""
    pack_of = np.full(len(units), -1, dtype=np.int64)
    early = sizes[~held]
    if len(early) and len(units) >= _BUCKETS_FROM * capacity and early[-1] > 0:
        pack_of[~held], loads = _fill_by_buckets(early, count, capacity)
    else:
        pack_of[~held], loads = _fill_by_heap(early.tolist(), count, capacity)
    pack_of[held], loads = complete(loads, sizes[held], capacity=capacity, seed=seed)
    placed = pack_of >= 0
    first = units.take(np.flatnonzero(placed))
    rest = units.take(np.flatnonzero(~placed)).lists()
    late_samples, late_packs = _repair(loads, rest, sizes[~placed].tolist(), lengths, capacity)
    samples = np.concatenate([first.values, late_samples])
    packs = np.concatenate([np.repeat(pack_of[placed], first.counts), late_packs])
    counts = np.bincount(packs)
    ends = np.cumsum(counts[counts > 0])
    return Ragged(
        np.concatenate([[0], ends]), samples[np.argsort(packs, kind="stable")].astype(np.int64)
    )


def _fill_by_heap(sizes: list[int], count: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Each unit into the emptiest bin, the lowest number of those.

    Returns:
        int64 [units] bin or -1 where no bin had room; int64 [count] loads.
    """
    heap = list(range(count))  # load << 32 | bin: one int compares faster than a tuple
    mask = (1 << _BIN_BITS) - 1
    pack_of = []
    for size in sizes:
        least = heap[0]
        if (least >> _BIN_BITS) + size <= capacity:
            pack_of.append(least & mask)
            heapq.heapreplace(heap, least + (size << _BIN_BITS))
        else:
            pack_of.append(-1)
    loads = np.zeros(count, dtype=np.int64)
    for entry in heap:
        loads[entry & mask] = entry >> _BIN_BITS
    return np.array(pack_of, dtype=np.int64), loads


def _fill_by_buckets(sizes: np.ndarray, count: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_fill_by_heap`, for many units of few sizes: all bins of one load at once.

    Units of one size go to bins by ascending load and number, and a bin that got one comes again
    later, at its new load: exactly what the heap does, without touching bins one by one.
    """
    pack_of = np.full(len(sizes), -1, dtype=np.int64)
    buckets: dict[int, list[np.ndarray]] = {0: [np.arange(count)]}  # parts ascend
    lowest = 0
    begins = np.flatnonzero(np.concatenate([[True], sizes[1:] != sizes[:-1]])).tolist()
    for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True):
        size, place = int(sizes[begin]), begin
        while place < end:
            while lowest not in buckets:
                lowest += 1
            if lowest + size > capacity:
                break
            parts = buckets.pop(lowest)
            bins = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))
            taken = bins[: end - place]
            if len(taken) < len(bins):
                buckets[lowest] = [bins[len(taken) :]]
            pack_of[place : place + len(taken)] = taken
            buckets.setdefault(lowest + size, []).append(taken)
            place += len(taken)
    loads = np.zeros(count, dtype=np.int64)
    for load, parts in buckets.items():
        for part in parts:
            loads[part] = load
    return pack_of, loads


def _repair(
    loads: np.ndarray,
    rest: list[list[int]],
    sizes: list[int],
    lengths: np.ndarray,
    capacity: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Best fit for what the first pass left; a unit that fits nowhere is halved until it does.

    Returns:
        Samples in the order of placing, and their packs; new packs count on from `loads`.
    """
    free, count = _FreeSpace(), len(loads)
    for number in np.argsort(loads, kind="stable").tolist() if rest else ():
        free.add(number, capacity - int(loads[number]))
    samples: list[int] = []
    packs: list[int] = []
    for size, unit in zip(sizes, rest, strict=True):
        stack = [(size, unit)]
        while stack:
            size, part = stack.pop()
            found = free.take(size)
            if found is None and len(part) > 1:
                halves = part[: len(part) // 2], part[len(part) // 2 :]
                stack += [(int(lengths[half].sum()), half) for half in reversed(halves)]
                continue
            if found is None:
                found = count, capacity
                count += 1
            number, space = found
            free.add(number, space - size)
            samples += part
            packs += [number] * len(part)
    return np.array(samples, dtype=np.int64), np.array(packs, dtype=np.int64)


def pack_bfd(lengths: np.ndarray, samples: np.ndarray, *, capacity: int, seed: int) -> Ragged:
    """Best-fit decreasing: the fullest packs, the least alike."""
    order = np.lexsort((hash_u64(samples, seed, _ORDER_KEY), -lengths[samples]))
    free, count = _FreeSpace(), 0
    packs = np.empty(len(order), dtype=np.int64)
    for place, size in enumerate(lengths[samples[order]].tolist()):
        found = free.take(size)
        if found is None:
            found = count, capacity
            count += 1
        packs[place] = found[0]
        free.add(found[0], found[1] - size)
    counts = np.bincount(packs, minlength=count)
    members = samples[order][np.argsort(packs, kind="stable")]
    return Ragged(np.concatenate([[0], np.cumsum(counts)]), members.astype(np.int64))
