"""Filling packs to the last position: short units held back until the rest is placed.

Longest first into the emptiest leaves every pack short of full by about half of the shortest unit.
So some short units of many sizes wait, and then every pack in turn gets a few of them at random and
one or two chosen so that their sizes add up to exactly what is left.
"""

import numpy as np

from ghostvis_mega.data.order import hash_u64

HELD_SHARE = 0.2
"""Share of all positions that is held back."""

_HOLD_KEY, _DRAW_KEY = 5, 6
_DRAWN_FROM = 1.5
"""Held units are drawn from the shortest ones, which together are this many times as long: too few
sizes would leave no choice, long units would not fill evenly."""
_SHORTEST_LIMIT, _LONGEST_LIMIT = 16, 8
"""Units up to capacity/16 may be held back in any case, none above capacity/8."""
_ENDS_BELOW = 2
"""Mean held sizes of free space below which units are chosen, not drawn."""
_SHORT_OF = 8
"""Free positions that a pack may keep: 0 is tried first, then 1, up to 7."""


def hold_back(sizes: np.ndarray, numbers: np.ndarray, *, capacity: int, seed: int) -> np.ndarray:
    """Which units wait: a random part, as even over sizes as they come, of the short ones.

    Args:
        sizes: int64 [units], descending.
        numbers: int64 [units]: identities that chance is drawn by.

    Returns:
        bool [units].
    """
    ascending = sizes[::-1]
    reached = np.cumsum(ascending)
    wanted = HELD_SHARE * int(reached[-1])
    limit = int(ascending[np.searchsorted(reached, _DRAWN_FROM * wanted)])
    limit = min(max(limit, capacity // _SHORTEST_LIMIT), capacity // _LONGEST_LIMIT)
    short = (sizes <= limit) & (sizes > 0)
    share = min(1.0, wanted / max(1, int(sizes[short].sum())))
    noise = hash_u64(numbers, seed, _HOLD_KEY) >> np.uint64(32)
    return short & (noise < np.uint64(int(share * 2**32)))


class _Pool:
    """Units that are left, by size; sums of two are found by one shift of a bit set."""

    def __init__(self, sizes: np.ndarray, *, capacity: int, seed: int):
        noise = hash_u64(np.arange(len(sizes)), seed, _DRAW_KEY)
        self._queue = iter(sizes[np.argsort(noise, kind="stable")].tolist())
        self._capacity = capacity
        self._counts: list[int] = np.bincount(sizes, minlength=capacity + 1).tolist()
        self._chosen = [0] * (capacity + 1)
        self.present = sum(1 << size for size, count in enumerate(self._counts) if count)
        # Bit capacity - size, so that shifted it meets `present` where two sizes add up.
        self._mirrored = sum(1 << capacity - size for size, n in enumerate(self._counts) if n)

    def _take(self, size: int) -> None:
        self._counts[size] -= 1
        if not self._counts[size]:
            self.present ^= 1 << size
            self._mirrored ^= 1 << self._capacity - size

    def draw(self) -> tuple[int, ...]:
        """Remove a unit at random and return its size; the pool must not be empty."""
        for size in self._queue:
            if not self._chosen[size]:
                self._take(size)
                return (size,)
            self._chosen[size] -= 1  # it was chosen before, and leaves the queue now
        raise AssertionError("units are in the pool and none in its queue")

    def choose(self, sizes: tuple[int, ...]) -> None:
        """Remove units of these sizes, those that would have been drawn next."""
        for size in sizes:
            self._take(size)
            self._chosen[size] += 1

    def ending(self, free: int) -> tuple[int, ...]:
        """One or two sizes that leave less than `_SHORT_OF` of `free`; () if there are none."""
        for goal in range(free, max(0, free - _SHORT_OF), -1):
            if self._counts[goal]:
                return (goal,)
            pairs = self.present & (self._mirrored >> (self._capacity - goal))
            while pairs:
                small = (pairs & -pairs).bit_length() - 1
                if 2 * small != goal or self._counts[small] > 1:
                    return small, goal - small
                pairs &= pairs - 1
        return ()

    def largest(self, free: int) -> tuple[int, ...]:
        """The largest size that leaves room for the smallest, else that fits; () if none does."""
        smallest = (self.present & -self.present).bit_length() - 1
        bound = free - smallest if free >= 2 * smallest else free
        size = (self.present & ((2 << bound) - 1)).bit_length() - 1
        return (size,) if size > 0 else ()


def complete(
    loads: np.ndarray, sizes: np.ndarray, *, capacity: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distribute held units over packs, the fullest first.

    Args:
        loads: int64 [packs] positions taken.
        sizes: int64 [held], positive, descending.

    Returns:
        int64 [held] pack or -1 where none was found; int64 [packs] loads.
    """
    loads, where = loads.copy(), np.full(len(sizes), -1, dtype=np.int64)
    if not len(sizes):
        return where, loads
    pool = _Pool(sizes, capacity=capacity, seed=seed)
    many = _ENDS_BELOW * int(sizes.sum()) // len(sizes)
    placed: list[int] = []
    counts = []
    order = np.argsort(-loads, kind="stable")
    for load in loads[order].tolist():
        before = len(placed)
        _fill_one(pool, capacity - load, many, placed)
        counts.append(len(placed) - before)
    packs, taken = np.repeat(order, counts), np.array(placed, dtype=np.int64)
    np.add.at(loads, packs, taken)
    # Units of one size go out as they stand in `sizes`.
    by_size = np.argsort(-taken, kind="stable")
    found = -taken[by_size]
    rank = np.arange(len(found)) - np.searchsorted(found, found)
    where[np.searchsorted(-sizes, found) + rank] = packs[by_size]
    return where, loads


def _fill_one(pool: _Pool, free: int, many: int, placed: list[int]) -> None:
    """Append the sizes that one pack with `free` positions gets."""
    ended = False
    sizes: tuple[int, ...]
    while pool.present and not ended:
        # What a draw could not place would be lost, so draws end where the longest might not fit.
        if free > many and free >= pool.present.bit_length() - 1:
            sizes = pool.draw()
        else:
            sizes = pool.ending(free)
            ended = bool(sizes)
            sizes = sizes or pool.largest(free)
            pool.choose(sizes)
            if not sizes:
                return
        placed += sizes
        free -= sum(sizes)
