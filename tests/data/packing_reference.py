"""The packers sample by sample on Python lists: slow, and what the fast ones must equal."""

import heapq
from collections import defaultdict

import numpy as np

from ghostvis_mega.data.order import hash_u64
from ghostvis_mega.data.packing import SLACK

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
    """Longest unit first into the emptiest of about ceil(total / capacity) packs; rest best-fit.

    Returns:
        Packs of sample numbers; every sample of `units` once; no pack longer than `capacity`.
    """
    size_of = lengths.tolist()
    sizes = np.array([sum(size_of[sample] for sample in unit) for unit in units], dtype=np.int64)
    order = np.lexsort((hash_u64(np.arange(len(units)), seed, _ORDER_KEY), -sizes))
    count = max(1, -(-int(sizes.sum() * (1 + SLACK)) // capacity))
    packs: list[list[int]] = [[] for _ in range(count)]
    heap = list(range(count))  # load << 32 | pack: one int compares faster than a tuple
    mask = (1 << _BIN_BITS) - 1
    rest: list[tuple[int, list[int]]] = []
    for size, unit in zip(
        sizes[order].tolist(), (units[number] for number in order.tolist()), strict=True
    ):
        least = heap[0]
        if (least >> _BIN_BITS) + size <= capacity:
            packs[least & mask].extend(unit)
            heapq.heapreplace(heap, least + (size << _BIN_BITS))
        else:
            rest.append((size, unit))
    free = _FreeSpace()
    for entry in sorted(heap):
        free.add(entry & mask, capacity - (entry >> _BIN_BITS))
    _repair(packs, free, rest, size_of, capacity)
    return [pack for pack in packs if pack]


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
                packs.append(part)


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
