"""Which rank encodes which picture: arithmetic that every rank repeats, without communication.

The vision tower is replicated on every rank of the world, whatever the LLM's layout; the distinct
pictures of a global batch are spread over all of them by cost, and their embeddings travel to the
replicas that need them.
"""

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
    """Give each distinct picture to one rank.

    Pictures have one size, so counts are costs. Among the least loaded ranks one that needs the
    picture itself is
    preferred: its embedding need not travel.

    Args:
        wanted: Image ids of each data-parallel replica; repeats are allowed.
        places: Coordinates of every rank.
    """
    needs = [frozenset(ids) for ids in wanted]
    loads = [0] * len(places)
    encode: list[list[int]] = [[] for _ in places]
    for image in sorted(frozenset().union(*needs)):
        owner = min(
            range(len(places)),
            key=lambda rank: (loads[rank], not _receives(places[rank], image, needs), rank),
        )
        loads[owner] += 1
        encode[owner].append(image)
    return ImageDispatch(
        encode=tuple(tuple(ids) for ids in encode),
        wanted=tuple(tuple(sorted(ids)) for ids in needs),
    )


def _receives(place: Place, image: int, needs: Sequence[frozenset[int]]) -> bool:
    return place.pipeline == 0 and image in needs[place.data]
