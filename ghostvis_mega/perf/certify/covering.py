"""Few combinations in which every pair of values occurs: a covering design with forbidden
combinations.

Faults of composed systems nearly always need two settings at once; a set in which every legal pair
of values of two dimensions occurs together in some combination finds those, with about as many
combinations as the two longest dimensions have pairs. Greedy and deterministic; needs no torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

Choice = dict[str, str]
Dimensions = Mapping[str, Sequence[str]]
Legal = Callable[[Choice], bool]
Pair = tuple[str, str, str, str]
"""Dimension, value, dimension, value; in the order of the dimensions."""

_SEEDS = 12
"""How many open pairs each new combination is tried to be built around."""


def all_pairs(dimensions: Dimensions) -> Iterator[Pair]:
    """Every pair of values of two dimensions."""
    for one, two in combinations(dimensions, 2):
        for value in dimensions[one]:
            for other in dimensions[two]:
                yield one, value, two, other


def pairs_of(choice: Choice) -> set[Pair]:
    """The pairs that occur in a whole combination whose keys are in the dimensions' order."""
    return {(a, choice[a], b, choice[b]) for a, b in combinations(choice, 2)}


def complete(
    dimensions: Dimensions,
    legal: Legal,
    start: Choice,
    gain: Callable[[str, str, Choice], int] = lambda *_: 0,
) -> Choice | None:
    """A whole legal combination that holds `start`; None where there is none.

    Args:
        dimensions: Values by name.
        legal: Says of a partial combination whether it breaks no rule yet.
        start: Values that are given.
        gain: Worth of a value beside those already chosen; the best that is legal is taken first.
    """
    if not legal(start):
        return None
    left = [name for name in dimensions if name not in start]
    if not left:
        return {name: start[name] for name in dimensions}
    # A stable sort: between equals the order of the dimension decides.
    name = left[0]
    for value in sorted(dimensions[name], key=lambda value: -gain(name, value, start)):
        found = complete(dimensions, legal, start | {name: value}, gain)
        if found is not None:
            return found
    return None


def legal_pairs(dimensions: Dimensions, legal: Legal) -> set[Pair]:
    """Pairs that occur in some legal combination."""
    return {
        pair
        for pair in all_pairs(dimensions)
        if complete(dimensions, legal, {pair[0]: pair[1], pair[2]: pair[3]}) is not None
    }


def cover(dimensions: Dimensions, legal: Legal) -> list[Choice]:
    """Combinations in which every legal pair occurs, the most telling ones first."""
    wanted = legal_pairs(dimensions, legal)
    # In the order of the dimensions, so that the result does not depend on hashes.
    still_open = [pair for pair in all_pairs(dimensions) if pair in wanted]
    chosen: list[Choice] = []
    while still_open:
        remaining = set(still_open)

        def gain(name: str, value: str, start: Choice, remaining: set[Pair] = remaining) -> int:
            order = list(dimensions)
            return sum(
                (
                    (name, value, other, start[other])
                    if order.index(name) < order.index(other)
                    else (other, start[other], name, value)
                )
                in remaining
                for other in start
            )

        step = max(1, len(still_open) // _SEEDS)
        candidates = [
            complete(dimensions, legal, {one: value, two: other}, gain)
            for one, value, two, other in still_open[::step]
        ]
        best = max(
            (choice for choice in candidates if choice is not None),
            key=lambda choice: len(pairs_of(choice) & remaining),
        )
        chosen.append(best)
        covered = pairs_of(best)
        still_open = [pair for pair in still_open if pair not in covered]
    return chosen


def most_telling(choices: Sequence[Choice], count: int) -> list[Choice]:
    """Some of the combinations: each next one shows most new values, then most new pairs."""
    values: set[tuple[str, str]] = set()
    pairs: set[Pair] = set()
    left, picked = list(choices), []
    for _ in range(min(count, len(left))):
        best = max(left, key=lambda c: (len(c.items() - values), len(pairs_of(c) - pairs)))
        left.remove(best)
        picked.append(best)
        values |= best.items()
        pairs |= pairs_of(best)
    return picked
