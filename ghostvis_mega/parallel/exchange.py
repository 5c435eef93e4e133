"""Moving image embeddings from the ranks that encode to the ranks that read, and their gradients
back.

Shape legend: N pictures, T tokens an image, H LLM width. What travels are units: whole pictures, or
with context parallelism single rows of them, of which each rank gets those that lie in its slice.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from ghostvis_mega.parallel.dispatch import ImageDispatch
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.image_rows import ImageRows
from ghostvis_mega.utils.transfer import to_device

_WHOLE = np.zeros(1, dtype=np.int64)
"""The one unit of a picture that travels whole."""


class EmbeddingExchange:
    """The two all-to-alls of one window of a step; every rank of the world takes part in each, also
    with nothing to send.

    Args:
        dispatch: Owners and needs, the same on all ranks.
        groups: Of this rank.
        rows: Rows that each rank needs, the same on all ranks; None where replicas need pictures
            whole.
    """

    def __init__(self, dispatch: ImageDispatch, groups: Groups, rows: ImageRows | None = None):
        self.groups, self.rows = groups, rows
        self.own = dispatch.encode[groups.rank]
        self._units = 1 if rows is None else rows.tokens_per_image
        if rows is None:
            needs = [dict.fromkeys(ids, _WHOLE) for ids in dispatch.wanted]
            self._needs = {place: needs[place.data] for place in groups.places}
        else:
            self._needs = {place: rows.of(place) for place in groups.places}
        mine = self._needs[groups.place] if groups.is_first_stage else {}
        self.wanted = tuple(sorted(mine))
        """Pictures of which this rank needs something, ascending."""
        # Pictures this rank sends to each rank, and those it gets from each rank, in ascending
        # order.
        self.sent = [
            [i for i in self.own if place.pipeline == 0 and i in self._needs[place]]
            for place in groups.places
        ]
        self.received = [[i for i in ids if i in mine] for ids in dispatch.encode]

    def rows_of(self, image: int) -> np.ndarray | None:
        """The rows of a wanted picture that this rank gets, ascending; None: all."""
        return None if self.rows is None else self._needs[self.groups.place][image]

    def embeddings(self, own_NTH: torch.Tensor) -> dict[int, torch.Tensor]:
        """Distribute embeddings.

        Args:
            own_NTH: Embeddings of the pictures this rank encodes, by ascending id.

        Returns:
            Those of `wanted` in its order, [rows, H] each; none after the first pipeline stage.
        """
        sent = [
            (ids, self._needs[place])
            for ids, place in zip(self.sent, self.groups.places, strict=True)
        ]
        mine = self._needs[self.groups.place]
        got = self._all_to_all(
            self._split(own_NTH)[self._places(sent, own_NTH.device)],
            sent=[_count(ids, needs) for ids, needs in sent],
            received=[_count(ids, mine) for ids in self.received],
        )
        arrived = [image for ids in self.received for image in ids]
        parts = got.split([len(mine[image]) for image in arrived]) if arrived else ()
        found = {
            image: part.reshape(-1, own_NTH.shape[-1])
            for image, part in zip(arrived, parts, strict=True)
        }
        return {image: found[image] for image in self.wanted}

    def gradients(
        self, wanted: Mapping[int, torch.Tensor], *, shape_TH: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        """Send gradients of `wanted` embeddings back to the owners.

        Only tensor rank 0 sends: all tensor ranks of a stage hold the same full gradient.

        Args:
            wanted: fp32 [rows, H] by image.
            shape_TH: Of one picture's embedding.
            device: Of the gradients.

        Returns:
            fp32 [N, T, H] by ascending id: the sum over replicas and context-parallel ranks.
        """
        first, mine = self.groups.place.tensor == 0, self._needs[self.groups.place]
        sent = [ids if first else [] for ids in self.received]
        received = [
            (ids if place.tensor == 0 else [], self._needs[place])
            for ids, place in zip(self.sent, self.groups.places, strict=True)
        ]
        width = shape_TH[0] * shape_TH[1] // self._units
        parts = [wanted[image].reshape(-1, width) for ids in sent for image in ids]
        got = self._all_to_all(
            torch.cat(parts) if parts else torch.zeros((0, width), device=device),
            sent=[_count(ids, mine) for ids in sent],
            received=[_count(ids, needs) for ids, needs in received],
        )
        total = torch.zeros((len(self.own) * self._units, width), device=device)
        total.index_add_(0, self._places(received, device), got)
        return total.view(len(self.own), *shape_TH)

    def _split(self, own_NTH: torch.Tensor) -> torch.Tensor:
        """[N * units, elements of a unit]."""
        num, tokens, width = own_NTH.shape
        return own_NTH.reshape(num * self._units, tokens * width // self._units)

    def _places(
        self,
        lists: Sequence[tuple[Sequence[int], Mapping[int, np.ndarray]]],
        device: torch.device,
    ) -> torch.Tensor:
        """Places of units among the units of this rank's own pictures."""
        first = {image: index * self._units for index, image in enumerate(self.own)}
        parts = [first[image] + needs[image] for ids, needs in lists for image in ids]
        index = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return to_device(torch.from_numpy(index), device)

    def _all_to_all(
        self, units: torch.Tensor, *, sent: list[int], received: list[int]
    ) -> torch.Tensor:
        got = units.new_empty((sum(received), *units.shape[1:]))
        dist.all_to_all_single(got, units.contiguous(), received, sent, group=self.groups.world)
        return got


def _count(images: Sequence[int], needs: Mapping[int, np.ndarray]) -> int:
    return sum(len(needs[image]) for image in images)
