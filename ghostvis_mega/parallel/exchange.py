"""Moving image embeddings from the ranks that encode to the ranks that read, and their gradients
back.

Shape legend: N pictures, T tokens an image, H LLM width.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ghostvis_mega.parallel.dispatch import ImageDispatch
from ghostvis_mega.parallel.groups import Groups, Place


class EmbeddingExchange:
    """The two all-to-alls of one step; every rank of the world takes part in each, also with
    nothing to send.

    Args:
        dispatch: Owners and needs, the same on all ranks.
        groups: Of this rank.
    """

    def __init__(self, dispatch: ImageDispatch, groups: Groups):
        self.groups = groups
        self.own = dispatch.encode[groups.rank]
        self.wanted = dispatch.wanted[groups.place.data] if groups.is_first_stage else ()
        wanted_sets = [frozenset(ids) for ids in dispatch.wanted]
        # Pictures this rank sends to each rank, and those it gets from each rank, in ascending
        # order.
        self.sent = [_common(self.own, wanted_sets, place) for place in groups.places]
        mine = frozenset(self.wanted)
        self.received = [[i for i in ids if i in mine] for ids in dispatch.encode]

    def embeddings(self, own_NTH: torch.Tensor) -> torch.Tensor:
        """Distribute embeddings.

        Args:
            own_NTH: Embeddings of the pictures this rank encodes, by ascending id.

        Returns:
            [N', T, H]: those of `wanted`, by ascending id; N' is 0 after the first pipeline stage.
        """
        got = self._all_to_all(_pick(own_NTH, self.own, self.sent), self.sent, self.received)
        return got[_order(self.received, self.wanted, got.device)]

    def gradients(self, wanted_NTH: torch.Tensor) -> torch.Tensor:
        """Send gradients of `wanted` embeddings back to the owners, who get the sum over replicas.

        Only tensor rank 0 sends: all tensor ranks of a stage hold the same full gradient.
        """
        first = self.groups.place.tensor == 0
        sent = [ids if first else [] for ids in self.received]
        received = [
            ids if place.tensor == 0 else []
            for ids, place in zip(self.sent, self.groups.places, strict=True)
        ]
        got = self._all_to_all(_pick(wanted_NTH, self.wanted, sent), sent, received)
        total = torch.zeros(
            (len(self.own), *wanted_NTH.shape[1:]), dtype=got.dtype, device=got.device
        )
        position = {image: index for index, image in enumerate(self.own)}
        index = [position[image] for ids in received for image in ids]
        return total.index_add_(0, torch.tensor(index, dtype=torch.int64, device=got.device), got)

    def _all_to_all(
        self, rows: torch.Tensor, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        counts_in, counts_out = [len(ids) for ids in received], [len(ids) for ids in sent]
        got = rows.new_empty((sum(counts_in), *rows.shape[1:]))
        dist.all_to_all_single(
            got, rows.contiguous(), counts_in, counts_out, group=self.groups.world
        )
        return got


def _common(own: Sequence[int], wanted: Sequence[frozenset[int]], place: Place) -> list[int]:
    return [image for image in own if place.pipeline == 0 and image in wanted[place.data]]


def _pick(rows: torch.Tensor, ids: Sequence[int], lists: Sequence[Sequence[int]]) -> torch.Tensor:
    position = {image: index for index, image in enumerate(ids)}
    index = [position[image] for chosen in lists for image in chosen]
    return rows[torch.tensor(index, dtype=torch.int64, device=rows.device)]


def _order(
    lists: Sequence[Sequence[int]], target: Sequence[int], device: torch.device
) -> torch.Tensor:
    position = {image: index for index, image in enumerate(image for ids in lists for image in ids)}
    return torch.tensor([position[image] for image in target], dtype=torch.int64, device=device)
