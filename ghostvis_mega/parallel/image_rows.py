"""Which rows of which picture each context-parallel rank shows: arithmetic that every rank repeats,
without communication."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.data.batch import SequenceLayout
from ghostvis_mega.model.context import row_owners
from ghostvis_mega.parallel.groups import Place


@dataclass(frozen=True)
class ImageRows:
    """Rows of picture embeddings that the slices of a global batch need."""

    tokens_per_image: int
    needed: tuple[tuple[dict[int, np.ndarray], ...], ...]
    """needed[data][context][image id]: int64 rows of the picture, ascending; images without a row
    in that slice are left out."""

    def of(self, place: Place) -> dict[int, np.ndarray]:
        """What the ranks at a place need, whatever their pipeline stage."""
        return self.needed[place.data][place.context]


def image_rows(
    replicas: Sequence[Sequence[SequenceLayout]], *, tokens_per_image: int, context: int
) -> ImageRows:
    """Cut the pictures of a global batch over the context-parallel ranks.

    Args:
        replicas: Sequences of each data-parallel replica.
        tokens_per_image: Rows of a picture.
        context: Context-parallel ranks of a replica.
    """
    return ImageRows(
        tokens_per_image=tokens_per_image,
        needed=tuple(_replica_rows(layouts, tokens_per_image, context) for layouts in replicas),
    )


def _replica_rows(
    layouts: Sequence[SequenceLayout], tokens_per_image: int, context: int
) -> tuple[dict[int, np.ndarray], ...]:
    ids, owners = [], []
    for layout in layouts:
        if layout.image_ids:
            places = np.array(layout.image_starts)[:, None] + np.arange(tokens_per_image)
            owners.append(row_owners(layout.segments, size=context)[places])
            ids.append(layout.image_ids)
    if not ids:
        return tuple({} for _ in range(context))
    slots = np.concatenate(ids)
    order = slots.argsort(kind="stable")
    images, first = np.unique(slots[order], return_index=True)
    owner_NT = np.concatenate(owners)[order]
    found = []
    for rank in range(context):
        # A picture shown several times may be cut at different rows: the union of its slots.
        image, row = np.logical_or.reduceat(owner_NT == rank, first).nonzero()
        ends = np.searchsorted(image, np.arange(len(images)), side="right")
        parts = np.split(np.ascontiguousarray(row), ends[:-1])
        found.append({i: own for i, own in zip(images.tolist(), parts, strict=True) if len(own)})
    return tuple(found)
