"""Which dataset fills which place of the stream: closed form, nothing is remembered.

The stream is cut into cycles. A cycle gives every source an exact number of places (its quota),
spread evenly over the cycle and jittered by a hash of the cycle, so that a source is never more
than about one place away from its share. Within a source, places come in order: its n-th place in
the stream takes its n-th sequence, so each source passes its own epochs without replacement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Literal

import numpy as np

from ghostvis_mega.data.order import hash_u64
from ghostvis_mega.data.plan import PackPlan
from ghostvis_mega.utils.errors import ConfigError

LONGEST_CYCLE = 4096
_JITTER_KEY = 21


def quotas(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Places of each source in one cycle: exact if that takes at most `LONGEST_CYCLE` places.

    Otherwise a cycle has `LONGEST_CYCLE` places and quotas are rounded by largest remainder.

    Args:
        shares: not negative, at least one positive; need not sum to 1.

    Raises:
        ConfigError: a positive share is smaller than one place.
    """
    total = sum(shares)
    whole = lcm(*(share.denominator for share in shares))
    exact = [int(share * whole) for share in shares]
    common = gcd(*exact)
    exact = [count // common for count in exact]
    if sum(exact) <= LONGEST_CYCLE:
        return tuple(exact)
    wanted = [share / total * LONGEST_CYCLE for share in shares]
    found = [int(count) for count in wanted]
    by_remainder = sorted(range(len(shares)), key=lambda k: (found[k] - wanted[k], k))
    for source in by_remainder[: LONGEST_CYCLE - sum(found)]:
        found[source] += 1
    lost = [k for k, share in enumerate(shares) if share > 0 and found[k] == 0]
    if lost:
        raise ConfigError(
            [
                f"data.blend[{k}].weight is less than one sequence in {LONGEST_CYCLE}: raise it, "
                "or leave the dataset out"
                for k in lost
            ]
        )
    return tuple(found)


@dataclass(frozen=True)
class Phase:
    """Quotas that hold from sequence number `start` on."""

    start: int
    quotas: tuple[int, ...]


class BlendOrder:
    """Source and place in it for any sequence number.

    Args:
        phases: by ascending start; the first starts at 0.
        seed: of the jitter.
    """

    def __init__(self, phases: Sequence[Phase], *, seed: int):
        self.phases, self._seed = tuple(phases), seed
        self._starts = np.array([phase.start for phase in phases], dtype=np.int64)
        self._before = [np.zeros(len(phases[0].quotas), dtype=np.int64)]
        for number, phase in enumerate(phases[1:]):
            length = phase.start - phases[number].start
            self._before.append(self._before[-1] + self._used(number, length))

    @property
    def num_sources(self) -> int:
        """Datasets that are blended."""
        return len(self.phases[0].quotas)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sequence number, and how many of that source came before it.

        Args:
            numbers: int64, ascending; work grows with the cycles between first and last.

        Returns:
            int64 [n] each.
        """
        sources, places = np.empty_like(numbers), np.empty_like(numbers)
        phase_of = np.searchsorted(self._starts, numbers, side="right") - 1
        for number in np.unique(phase_of).tolist():
            chosen = phase_of == number
            found = self._locate_in(number, numbers[chosen] - self.phases[number].start)
            sources[chosen], places[chosen] = found
        return sources, places

    def consumed(self, number: int) -> np.ndarray:
        """Sequences of each source before sequence `number`: int64 [sources]."""
        phase = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._before[phase] + self._used(phase, number - self.phases[phase].start)

    def _used(self, phase: int, count: int) -> np.ndarray:
        """Sequences of each source among the first `count` of a phase."""
        shares = np.array(self.phases[phase].quotas, dtype=np.int64)
        cycles, rest = divmod(count, int(shares.sum()))
        first = self._source_of(shares)[self._layout(phase, np.array([cycles]))[0, :rest]]
        return cycles * shares + np.bincount(first, minlength=len(shares))

    def _locate_in(self, phase: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shares = np.array(self.phases[phase].quotas, dtype=np.int64)
        cycles, slots = numbers // shares.sum(), numbers % shares.sum()
        distinct, row = np.unique(cycles, return_inverse=True)
        chosen = self._layout(phase, distinct)[row, slots]
        source = self._source_of(shares)[chosen]
        rank = chosen - (np.cumsum(shares) - shares)[source]
        return source, self._before[phase][source] + cycles * shares[source] + rank

    @staticmethod
    def _source_of(shares: np.ndarray) -> np.ndarray:
        return np.repeat(np.arange(len(shares)), shares)

    def _layout(self, phase: int, cycles: np.ndarray) -> np.ndarray:
        """Tickets in the order of a cycle's places: int64 [cycles, places of a cycle].

        Tickets are numbered source by source. The j-th of q tickets of a source is drawn inside of
        the j-th of q equal parts of the cycle, so they keep their order and lie evenly.
        """
        shares = np.array(self.phases[phase].quotas, dtype=np.int64)
        source = self._source_of(shares)
        ticket = np.arange(len(source))
        rank = ticket - (np.cumsum(shares) - shares)[source]
        noise = hash_u64(cycles[:, None] * len(source) + ticket, self._seed, phase, _JITTER_KEY)
        jitter = (noise >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.argsort((rank + jitter) / shares[source], axis=1, kind="stable")


@dataclass(frozen=True)
class BlendWeights:
    """Shares of several datasets as a person states them.

    Args:
        unit: what the weights are shares of: sequences (packs), samples, or useful tokens.
        changes: (step, weights): from this step on; the first at step 0.
    """

    unit: Literal["packs", "samples", "tokens"]
    changes: tuple[tuple[int, tuple[float, ...]], ...]

    def phases(self, plans: Sequence[PackPlan], *, global_size: int) -> list[Phase]:
        """Quotas of sequences, from the mean content of a pack of each dataset.

        Raises:
            ConfigError: a positive weight is less than one sequence in a cycle.
        """
        means = [_mean_content(plan, self.unit) for plan in plans]
        return [
            Phase(
                start=step * global_size,
                quotas=quotas([Fraction(str(w)) / m for w, m in zip(weights, means, strict=True)]),
            )
            for step, weights in self.changes
        ]


def _mean_content(plan: PackPlan, unit: str) -> Fraction:
    content = {"packs": plan.num_packs, "samples": len(plan.samples)}
    return Fraction(content.get(unit, int(plan.tokens.sum())), plan.num_packs)
