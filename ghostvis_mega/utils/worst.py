"""The worst of several figures, with NaN as the worst of all."""

import math
from collections.abc import Iterable


def worst[Key](figures: Iterable[tuple[Key, float]]) -> tuple[Key, float]:
    """The pair of the largest figure; a NaN is above everything, wherever it stands.

    `max` would drop a NaN unless it came first: nothing is larger than it, and it than nothing.

    Raises:
        ValueError: There is none.
    """
    return max(figures, key=lambda figure: (math.isnan(figure[1]), figure[1]))
