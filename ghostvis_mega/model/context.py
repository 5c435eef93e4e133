"""Which rows of a sequence each context-parallel rank computes: arithmetic on segment lengths.

Each segment (a packed sample, the padding tail, or a whole row without packing) is cut into
2 * size chunks; rank r takes chunk r and chunk 2 * size - 1 - r, an early and a late one, so that
causal attention costs all ranks the same. A rank keeps its rows in ascending order: segment after
segment, the early chunk before the late one. That is the order in which Transformer Engine's ring
attention expects them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ContextSlice:
    """One context-parallel rank of `size`."""

    size: int = 1
    rank: int = 0

    def rows(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of this rank, ascending: int64 [sum of lengths / size].

        Args:
            lengths: Of the segments, in order.

        Raises:
            ValueError: A segment is not a multiple of 2 * size.
        """
        return np.flatnonzero(row_owners(lengths, size=self.size) == self.rank)


WHOLE = ContextSlice()
"""Everything on one rank: no context parallelism."""


def row_owners(lengths: Sequence[int] | np.ndarray, *, size: int) -> np.ndarray:
    """The context-parallel rank that computes each row: int64 [sum of lengths].

    Args:
        lengths: Of the segments, in order; each a multiple of 2 * size where size > 1.
        size: Number of context-parallel ranks.

    Raises:
        ValueError: A segment is not.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if size == 1:
        return np.zeros(int(lengths.sum()), dtype=np.int64)
    if (wrong := lengths[lengths % (2 * size) != 0]).size:
        raise ValueError(
            f"a segment of {wrong[0]} positions cannot be cut over {size} context-parallel ranks: "
            f"its length must be a multiple of {2 * size}"
        )
    offsets = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chunks = offsets // np.repeat(lengths // (2 * size), lengths)
    return np.minimum(chunks, 2 * size - 1 - chunks)


def gathered_places(lengths: Sequence[int] | np.ndarray, *, size: int) -> np.ndarray:
    """Where each row stands when the rows of all ranks are joined in rank order: int64.

    `joined[gathered_places(...)]` is the sequence in its own order again.
    """
    # A stable sort by owner is the joined order.
    joined = np.argsort(row_owners(lengths, size=size), kind="stable")
    places = np.empty_like(joined)
    places[joined] = np.arange(len(joined))
    return places
