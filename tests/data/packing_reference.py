"""The packers sample by sample on Python lists: slow, and what the fast ones must equal."""

import heapq
from collections import Counter, defaultdict

import numpy as np

from ghostvis_mega.data.order import hash_u64
from ghostvis_mega.data.packing import PLAIN_SLACK, SLACK

_ORDER_KEY = 1
_BIN_BITS = 32


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


def _fill(packs: list[list[int]], free: _FreeSpace, samples: list[int], size: int) -> bool:
    """Put `samples` into the fullest pack that holds them all."""
    found = free.take(size)
    if found is None:
        return False
    number, space = found
    packs[number].extend(samples)
    free.add(number, space - size)
    return True


def make_units(
    lengths: np.ndarray, groups: np.ndarray, *, limit: int, seed: int
) -> list[list[int]]:
    """Chunks of samples of one group, each at most `limit` long (or one sample), evenly filled.

    Args:
        lengths: int64 [samples].
        groups: int64 [samples]; equal numbers want to share a pack.
    """
    order = np.lexsort((hash_u64(np.arange(len(lengths)), seed, _ORDER_KEY), groups))
    size_of, group_of = lengths.tolist(), groups.tolist()
    totals = np.bincount(groups, weights=lengths).astype(np.int64).tolist()
    units: list[list[int]] = []
    current: list[int] = []
    group, size, target = -1, 0, 0
    for sample in order.tolist():
        length = size_of[sample]
        if group_of[sample] != group or size + length > limit or size >= target:
            if current:
                units.append(current)
            current, size = [], 0
            if group_of[sample] != group:
                group = group_of[sample]
                target = totals[group] / -(-totals[group] // limit)
        current.append(sample)
        size += length
    if current:
        units.append(current)
    return units


def pack_balanced(
    lengths: np.ndarray, units: list[list[int]], *, capacity: int, seed: int
) -> list[list[int]]:
    """Longest unit first into the emptiest of about ceil(total / capacity) packs, then what was
    held back, then best-fit; without holding back if that takes fewer packs.

    Returns:
        Packs of sample numbers; every sample of `units` once; no pack longer than `capacity`.
    """
    size_of = lengths.tolist()
    sizes = np.array([sum(size_of[sample] for sample in unit) for unit in units], dtype=np.int64)
    order = np.lexsort((hash_u64(np.arange(len(units)), seed, _ORDER_KEY), -sizes))
    items = [(int(sizes[number]), number, units[number]) for number in order.tolist()]
    total = int(sizes.sum())
    held = _hold_back(items, total, capacity, seed)
    packs = _pack(items, held, _count(total, SLACK, capacity), size_of, capacity, seed)
    plain = _count(total, PLAIN_SLACK, capacity)
    if len(packs) > plain:
        packs = min(_pack(items, set(), plain, size_of, capacity, seed), packs, key=len)
    return packs


def _count(total: int, slack: float, capacity: int) -> int:
    return max(1, -(-int(total * (1 + slack)) // capacity))


def _hold_back(
    items: list[tuple[int, int, list[int]]], total: int, capacity: int, seed: int
) -> set[int]:
    """Numbers of units that wait: a fifth of all positions, from the shortest 30 %."""
    limit, reached = 0, 0
    for size, _, _ in reversed(items):
        limit, reached = size, reached + size
        if reached >= 1.5 * (0.2 * total):
            break
    limit = min(max(limit, capacity // 16), capacity // 8)
    short = [(size, number) for size, number, _ in items if 0 < size <= limit]
    share = min(1.0, 0.2 * total / max(1, sum(size for size, _ in short)))
    return {
        number
        for _, number in short
        if (int(hash_u64(np.array([number]), seed, 5)[0]) >> 32) < int(share * 2**32)
    }


def _pack(
    items: list[tuple[int, int, list[int]]],
    held: set[int],
    count: int,
    size_of: list[int],
    capacity: int,
    seed: int,
) -> list[list[int]]:
    heap = list(range(count))  # load << 32 | pack: one int compares faster than a tuple
    mask = (1 << _BIN_BITS) - 1
    pack_of: dict[int, int] = {}  # by place in `items`
    for place, (size, number, _) in enumerate(items):
        least = heap[0]
        if number not in held and (least >> _BIN_BITS) + size <= capacity:
            pack_of[place] = least & mask
            heapq.heapreplace(heap, least + (size << _BIN_BITS))
    frees = {entry & mask: capacity - (entry >> _BIN_BITS) for entry in heap}
    waiting = [(place, size) for place, (size, number, _) in enumerate(items) if number in held]
    pack_of |= _complete(frees, waiting, seed)
    packs: list[list[int]] = [[] for _ in range(count)]
    rest = []
    for place, (size, _, unit) in enumerate(items):
        if place in pack_of:
            packs[pack_of[place]].extend(unit)
        else:
            rest.append((size, unit))
    free = _FreeSpace()
    for number in sorted(range(count), key=lambda number: (-frees[number], number)):
        free.add(number, frees[number])
    _repair(packs, free, rest, size_of, capacity)
    return [pack for pack in packs if pack]


def _complete(frees: dict[int, int], waiting: list[tuple[int, int]], seed: int) -> dict[int, int]:
    """Packs of waiting units, by trying every size; `frees` changes in place."""
    noise = hash_u64(np.arange(len(waiting)), seed, 6)
    queue = [waiting[rank][1] for rank in np.argsort(noise, kind="stable").tolist()]
    many = 2 * sum(queue) // max(1, len(queue))
    unused = defaultdict(list)
    for place, size in reversed(waiting):
        unused[size].append(place)
    pack_of = {}
    for pack in sorted(frees, key=lambda number: (frees[number], number)):
        ended = False
        while queue and not ended:
            sizes: tuple[int, ...] = ()
            if frees[pack] > many and frees[pack] >= max(queue):
                sizes = (queue[0],)
            else:
                sizes = _ending(queue, frees[pack])
                ended = bool(sizes)
                sizes = sizes or _largest(queue, frees[pack])
            if not sizes:
                break
            for size in sizes:
                queue.remove(size)
                pack_of[unused[size].pop()] = pack
                frees[pack] -= size
    return pack_of


def _ending(queue: list[int], free: int) -> tuple[int, ...]:
    counts = Counter(queue)
    for goal in range(free, max(0, free - 8), -1):
        if counts[goal]:
            return (goal,)
        for small in sorted(counts):
            other = goal - small
            if other in counts and (small != other or counts[small] > 1):
                return (small, other)
    return ()


def _largest(queue: list[int], free: int) -> tuple[int, ...]:
    smallest = min(queue)
    bound = free - smallest if free >= 2 * smallest else free
    return tuple(sorted(size for size in set(queue) if size <= bound)[-1:])


def _repair(
    packs: list[list[int]],
    free: _FreeSpace,
    rest: list[tuple[int, list[int]]],
    size_of: list[int],
    capacity: int,
) -> None:
    """Best fit for what the first pass left; a unit that fits nowhere is halved until it does."""
    for size, unit in rest:
        stack = [(size, unit)]
        while stack:
            size, part = stack.pop()
            if _fill(packs, free, part, size):
                continue
            if len(part) > 1:
                halves = part[: len(part) // 2], part[len(part) // 2 :]
                stack += [
                    (sum(size_of[sample] for sample in half), half) for half in reversed(halves)
                ]
            else:
                free.add(len(packs), capacity - size)
                packs.append(list(part))


def pack_bfd(
    lengths: np.ndarray, samples: np.ndarray, *, capacity: int, seed: int
) -> list[list[int]]:
    """Best-fit decreasing: the fullest packs, the least alike."""
    order = np.lexsort((hash_u64(samples, seed, _ORDER_KEY), -lengths[samples]))
    packs: list[list[int]] = []
    free = _FreeSpace()
    for sample in samples[order].tolist():
        size = int(lengths[sample])
        if not _fill(packs, free, [sample], size):
            free.add(len(packs), capacity - size)
            packs.append([sample])
    return packs
