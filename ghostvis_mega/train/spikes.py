"""Telling a loss spike from the ordinary scatter of losses.

The centre is the median of the recent losses, the scale a median absolute deviation (Hampel's
identifier): half of the losses may be wild before either moves far, where a mean and a standard
deviation follow the very spikes that they should find. The scale is the larger of two: of the
recent losses around their median, which wanders with a slow drift, and of the differences between
neighbours, which a steady slope leaves alone.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_SIGMA = 1e-3
"""Of the centre; losses that hardly scatter are no reason to refuse one a little above them."""


class SpikeDetector:
    """Judges losses against those that were taken before; equal on ranks that are given the same.

    Args:
        window: Losses to remember.
        sigma: Robust standard deviations above the centre that make a spike.
    """

    def __init__(self, *, window: int, sigma: float):
        self.window, self.sigma = window, sigma
        self._losses: deque[float] = deque(maxlen=window)

    def score(self, loss: float) -> float:
        """Robust standard deviations of `loss` above the recent ones; 0 while too few are known."""
        if len(self._losses) < self.window // 4:
            return 0.0
        losses = list(self._losses)
        recent = losses[-(self.window // 2) :]
        centre = statistics.median(recent)
        steps = [abs(after - before) for before, after in zip(losses, losses[1:], strict=False)]
        scale = max(
            _TO_SIGMA * statistics.median(abs(value - centre) for value in recent),
            _TO_SIGMA * statistics.median(steps) / math.sqrt(2),
            _LEAST_SIGMA * abs(centre),
        )
        return (loss - centre) / scale if scale > 0 else 0.0

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss lies too far above the recent ones."""
        return self.score(loss) > self.sigma

    def take(self, loss: float) -> None:
        """Remember the loss of a step that was trained on."""
        assert math.isfinite(loss), "a loss that is no number would spoil the statistics"
        self._losses.append(loss)

    def forget(self) -> None:
        """Begin anew, as where the data become others."""
        self._losses.clear()

    @property
    def losses(self) -> list[float]:
        """What is remembered, oldest first."""
        return list(self._losses)

    def restore(self, losses: Sequence[float]) -> None:
        """Remember what another detector did."""
        self._losses = deque(map(float, losses), maxlen=self.window)
