"""Which rank encodes which picture: arithmetic that every rank repeats, without communication.

The vision tower is replicated on every rank of the world, whatever the LLM's layout; the distinct
pictures of a global batch are spread over all of them by cost, and their embeddings travel to the
replicas that need them.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ghostvis_mega.parallel.groups import Place


@dataclass(frozen=True)
class ImageDispatch:
    """The pictures of one global batch, owned and wanted; all id lists ascend."""

    encode: tuple[tuple[int, ...], ...]
    """Image ids that each global rank encodes."""
    wanted: tuple[tuple[int, ...], ...]
    """Distinct image ids that each data-parallel replica needs."""
    patches: Mapping[int, int] | None = None
    """Patches of each picture; None: all pictures have the same number."""

    @property
    def num_images(self) -> int:
        """Distinct pictures of the batch."""
        return sum(len(ids) for ids in self.encode)

    @property
    def loads(self) -> list[int]:
        """Patches that each rank encodes; pictures, where all are alike."""
        if self.patches is None:
            return [len(ids) for ids in self.encode]
        return [sum(self.patches[image] for image in ids) for ids in self.encode]

    def imbalance(self) -> float:
        """Patches of the busiest rank over the mean; 1.0 is perfect, 0.0 means no pictures at
        all."""
        return imbalance([self])


def imbalance(dispatches: Sequence[ImageDispatch]) -> float:
    """Patches of the busiest rank of each window over the mean, all windows together: ranks wait
    for each other in every one."""
    loads = [dispatch.loads for dispatch in dispatches]
    total = sum(sum(each) for each in loads)
    return sum(max(each) * len(each) for each in loads) / total if total else 0.0


def dispatch_images(
    wanted: Sequence[Sequence[int]],
    places: Sequence[Place],
    *,
    patches: Mapping[int, int] | None = None,
) -> ImageDispatch:
    """Give each distinct picture to one rank, as evenly as patches allow.

    Pictures with the most patches come first. A rank that needs the picture itself is preferred
    while that keeps it within the mean load: its embedding need not travel. What no such rank has
    room for goes to the least loaded of all. No rank bears more than the mean and one picture.
    Linear in pictures, but for a logarithm of the ranks.

    Args:
        wanted: Image ids of each data-parallel replica; repeats are allowed.
        places: Coordinates of every rank.
        patches: Cost of each picture that is wanted; None: all cost the same.
    """
    needs = [frozenset(ids) for ids in wanted]
    images = sorted(frozenset().union(*needs))
    readers = _readers(needs, places)
    total = len(images) if patches is None else sum(patches[image] for image in images)
    ranks = _Ranks(len(places), total=total)
    for cost, alike in _by_cost(images, patches):
        _deal(alike, cost, readers, ranks)
    return ImageDispatch(
        encode=tuple(tuple(sorted(ids)) for ids in ranks.encode),
        wanted=tuple(tuple(sorted(ids)) for ids in needs),
        patches=patches,
    )


class _Ranks:
    """What each rank has to encode so far."""

    def __init__(self, count: int, *, total: int):
        self.total = total
        self.encode: list[list[int]] = [[] for _ in range(count)]
        self.loads = [0] * count
        self._heap = [(0, rank) for rank in range(count)]

    def has_room(self, rank: int, cost: int) -> bool:
        """Whether a rank stays within the mean of all."""
        return (self.loads[rank] + cost) * len(self.loads) <= self.total

    def least(self) -> int:
        """The least loaded rank, the lowest number of those."""
        # Loads only grow, so an entry may be out of date but never too high.
        while self._heap[0][0] != self.loads[self._heap[0][1]]:
            rank = self._heap[0][1]
            heapq.heapreplace(self._heap, (self.loads[rank], rank))
        return self._heap[0][1]

    def give(self, image: int, rank: int, cost: int) -> None:
        """Let a rank encode a picture."""
        self.loads[rank] += cost
        self.encode[rank].append(image)


def _by_cost(
    images: Sequence[int], patches: Mapping[int, int] | None
) -> Iterator[tuple[int, list[int]]]:
    """Pictures of equal cost together, the costliest first; ids ascend."""
    if patches is None:
        return iter([(1, list(images))])
    ordered = sorted(images, key=lambda image: -patches[image])
    return ((cost, list(alike)) for cost, alike in groupby(ordered, key=patches.__getitem__))


def _deal(
    images: Sequence[int], cost: int, readers: Mapping[int, Sequence[int]], ranks: _Ranks
) -> None:
    """Find owners for pictures of one cost.

    All look for a near owner before any looks further: otherwise pictures without one would take
    the room of those that come later.
    """
    loads, left = ranks.loads, []
    for image in images:
        near = min(readers[image], key=loads.__getitem__)
        if ranks.has_room(near, cost):
            ranks.give(image, near, cost)
        else:
            left.append(image)
    slots = []
    while len(slots) < len(left) and ranks.has_room(far := ranks.least(), cost):
        loads[far] += cost
        slots.append(far)
    for image, owner in zip(left, sorted(slots), strict=False):
        ranks.encode[owner].append(image)
    # Whoever takes these exceeds the mean, so only a reader that is least loaded itself comes
    # first.
    for image in left[len(slots) :]:
        near, far = min(readers[image], key=loads.__getitem__), ranks.least()
        ranks.give(image, near if loads[near] == loads[far] else far, cost)


def _readers(needs: Sequence[frozenset[int]], places: Sequence[Place]) -> dict[int, Sequence[int]]:
    """The ranks that read each picture, ascending: those of the first stage whose replica shows
    it."""
    first_stage: list[list[int]] = [[] for _ in needs]
    for rank, place in enumerate(places):
        if place.pipeline == 0:
            first_stage[place.data].append(rank)
    readers: dict[int, Sequence[int]] = {}
    for data, images in enumerate(needs):
        for image in images:
            known = readers.get(image)
            own = first_stage[data]
            # Most pictures have one replica and share its list.
            readers[image] = own if known is None else sorted([*known, *own])
    return readers
