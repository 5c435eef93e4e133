"""Which rank encodes which picture: arithmetic that every rank repeats, without communication.

The vision tower is replicated on every rank of the world, whatever the LLM's layout; the distinct
pictures of a global batch are spread over all of them by cost, and their embeddings travel to the
replicas that need them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ghostvis_mega.parallel.groups import Place


@dataclass(frozen=True)
class ImageDispatch:
    """The pictures of one global batch, owned and wanted; all id lists ascend."""

    encode: tuple[tuple[int, ...], ...]
    """Image ids that each global rank encodes."""
    wanted: tuple[tuple[int, ...], ...]
    """Distinct image ids that each data-parallel replica needs."""

    @property
    def num_images(self) -> int:
        """Distinct pictures of the batch."""
        return sum(len(ids) for ids in self.encode)

    def imbalance(self) -> float:
        """Pictures of the busiest rank over the mean; 1.0 is perfect, 0.0 means no pictures at
        all."""
        loads = [len(ids) for ids in self.encode]
        return max(loads) * len(loads) / self.num_images if self.num_images else 0.0


def dispatch_images(wanted: Sequence[Sequence[int]], places: Sequence[Place]) -> ImageDispatch:
    """Give each distinct picture to one rank, as evenly as counts allow.

    Pictures have one size, so counts are costs. A rank that needs the picture itself is preferred
    while it has room: its embedding need not travel. Linear in pictures and ranks.

    Args:
        wanted: Image ids of each data-parallel replica; repeats are allowed.
        places: Coordinates of every rank.
    """
    needs = [frozenset(ids) for ids in wanted]
    images = sorted(frozenset().union(*needs))
    share, extra = divmod(len(images), len(places))
    readers = _readers(needs, places)
    encode: list[list[int]] = [[] for _ in places]
    left = []
    for image in images:
        owner = _with_room(encode, readers[image], room=share)
        encode[owner].append(image) if owner is not None else left.append(image)
    # Whoever has less than its share takes what nobody near had room for; the remainder of the
    # division, at most one picture a rank, again goes to readers first.
    behind = [rank for rank, own in enumerate(encode) for _ in range(share - len(own))]
    for image, owner in zip(left, behind, strict=False):
        encode[owner].append(image)
    free = iter(range(len(places)))
    for image in left[len(behind) :]:
        owner = _with_room(encode, readers[image], room=share + 1)
        if owner is None:
            owner = next(rank for rank in free if len(encode[rank]) == share)
        encode[owner].append(image)
    assert max((len(own) for own in encode), default=0) <= share + (extra > 0)
    return ImageDispatch(
        encode=tuple(tuple(sorted(ids)) for ids in encode),
        wanted=tuple(tuple(sorted(ids)) for ids in needs),
    )


def _readers(
    needs: Sequence[frozenset[int]], places: Sequence[Place]
) -> defaultdict[int, list[int]]:
    """The ranks that read each picture: those of the first stage whose replica shows it."""
    first_stage = defaultdict(list)
    for rank, place in enumerate(places):
        if place.pipeline == 0:
            first_stage[place.data].append(rank)
    readers = defaultdict(list)
    for data, images in enumerate(needs):
        for image in images:
            readers[image] += first_stage[data]
    return readers


def _with_room(encode: Sequence[Sequence[int]], readers: Sequence[int], *, room: int) -> int | None:
    """The least loaded of `readers` that has less than `room` pictures."""
    best = min(readers, key=lambda rank: (len(encode[rank]), rank))
    return best if len(encode[best]) < room else None
