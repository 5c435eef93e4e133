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
    # A picture that is shown several times may be cut at different rows: each rank gets the union.
    shown: list[dict[int, np.ndarray]] = [{} for _ in range(context)]
    for layout in layouts:
        if not layout.image_ids:
            continue
        owners = row_owners(layout.segments, size=context)
        places = np.asarray(layout.image_starts)[:, None] + np.arange(tokens_per_image)
        for image, slot in zip(layout.image_ids, owners[places], strict=True):
            for rank in np.unique(slot).tolist():
                mine = slot == rank
                before = shown[rank].get(image)
                shown[rank][image] = mine if before is None else before | mine
    return tuple(
        {image: np.flatnonzero(mask) for image, mask in sorted(masks.items())} for masks in shown
    )
