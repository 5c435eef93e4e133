"""Which samples go where: by seed, share, key, or picture. Pure functions of index and seed.

The order comes from blake2b of (seed, number), not from a random generator, so that the same
choice is made by every version of every library.
"""

import hashlib
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.utils.errors import DataError


def seeded_order(count: int, seed: int) -> np.ndarray:
    """A permutation of range(count): int64 [count]."""
    prefix = hashlib.blake2b(f"order/{seed}/".encode(), digest_size=8)
    values = np.empty(count, dtype=np.uint64)
    for number in range(count):
        state = prefix.copy()
        state.update(number.to_bytes(8, "little"))
        values[number] = int.from_bytes(state.digest(), "little")
    return np.argsort(values, kind="stable").astype(np.int64)


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"share {text!r} is not a number such as 0.1 or 1/3") from error
    if not 0 < share <= 1:
        raise DataError(f"share {text} must be above 0 and at most 1")
    return share


def parse_shares(texts: Sequence[str]) -> list[Fraction]:
    """Shares of the parts of a split; they must add up to 1 exactly ("0.1", "1/3").

    Raises:
        DataError: a share is no number, out of range, or the sum is not 1.
    """
    shares = [_share(text) for text in texts]
    if sum(shares) != 1:
        raise DataError(
            f"the shares {', '.join(texts)} add up to {float(sum(shares)):g}, they must make 1"
        )
    return shares


def _bounds(count: int, shares: Sequence[Fraction]) -> list[int]:
    """Ends of consecutive runs of range(count), each within one of its share."""
    ends, total = [], Fraction(0)
    for share in shares:
        total += share
        ends.append(round(total * count))
    return ends


def split_samples(count: int, shares: Sequence[Fraction], *, seed: int) -> list[np.ndarray]:
    """Ascending sample indices of each part; together they are range(count)."""
    order = seeded_order(count, seed)
    return [np.sort(piece) for piece in np.split(order, _bounds(count, shares)[:-1])]


def picture_groups(dataset: Dataset) -> np.ndarray:
    """Group of each sample, int64 [samples]: two that share a picture, even by way of a third, are
    in one group, named by its first sample."""
    flat, counts = dataset.image_ids(np.arange(dataset.num_samples))
    parent = list(range(dataset.num_images))

    def root(image: int) -> int:
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    begins = np.cumsum(counts) - counts
    for sample in np.flatnonzero(counts > 1).tolist():
        first, *rest = flat[begins[sample] : begins[sample] + counts[sample]].tolist()
        for image in rest:
            a, b = sorted((root(first), root(image)))
            parent[b] = a
    groups = np.arange(dataset.num_samples)
    roots = np.array([root(image) for image in range(dataset.num_images)], dtype=np.int64)
    with_image = np.flatnonzero(counts > 0)
    names = roots[flat[begins[with_image]]]
    _, first_place, inverse = np.unique(names, return_index=True, return_inverse=True)
    groups[with_image] = with_image[first_place][inverse]
    return groups


def split_by_image(dataset: Dataset, shares: Sequence[Fraction], *, seed: int) -> list[np.ndarray]:
    """Like `split_samples`, but samples that share a picture stay together.

    Groups are whole, so a part may miss its share by about the size of one group.
    """
    groups = picture_groups(dataset)
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = seeded_order(len(sizes), seed)
    middles = np.empty(len(sizes))
    middles[order] = np.cumsum(sizes[order]) - sizes[order] / 2
    ends = np.array(_bounds(len(groups), shares), dtype=np.float64)
    part = np.minimum(np.searchsorted(ends, middles, side="left"), len(shares) - 1)[inverse]
    return [np.flatnonzero(part == number) for number in range(len(shares))]


def split_by_keys(dataset: Dataset, keys: Iterable[str]) -> list[np.ndarray]:
    """[samples whose key is listed, the others].

    Raises:
        DataError: a listed key is not in the dataset.
    """
    wanted = set(keys)
    found: set[str] = set()
    listed = np.zeros(dataset.num_samples, dtype=bool)
    for index in range(dataset.num_samples):
        key, _ = dataset.sample_key(index)
        if key in wanted:
            found.add(key)
            listed[index] = True
    if missing := sorted(wanted - found):
        raise DataError(
            f"{len(missing)} of {len(wanted)} listed keys are not in {dataset.path}, "
            f"the first is {missing[0]!r}"
        )
    return [np.flatnonzero(listed), np.flatnonzero(~listed)]


def pick(count: int, *, number: int | None, share: str | None, seed: int) -> np.ndarray:
    """Ascending indices of a random `number` or `share` of range(count).

    Raises:
        DataError: neither or both are given, or there are fewer samples than asked for.
    """
    if (number is None) == (share is None):
        raise DataError("say how many samples: either --number N or --share F")
    if share is not None:
        number = max(1, round(_share(share) * count))
    if not 1 <= number <= count:
        raise DataError(f"{number} samples are asked for, the dataset has {count}")
    return np.sort(seeded_order(count, seed)[:number])
