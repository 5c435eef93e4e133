"""What makes two pictures or two texts the same, exactly or nearly.

Pictures: a 64-bit difference hash (Hamming distance at most 4) and a 4x4 colour thumbnail find
candidates, which are then looked at in 16x16 places: drawn pictures on one background share their
hash and differ in a shape, compressed or resized copies differ a little everywhere. Texts: Jaccard
similarity of token triples, found by minhash and confirmed on the triples themselves. Every result
is "the first one of its kind": items are taken in order, and an item becomes the twin of the first
earlier kept item that it resembles. Likeness is not transitive, so a chain of small changes does
not fall together. Items below `references` are always kept: they belong to a set that others are
compared with.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from PIL import Image

from ghostvis_mega.data.pixels import decode_rgb

NEAR_BITS = 4
"""Largest Hamming distance of two near pictures."""
NEAR_TEXT = 0.8
"""Smallest Jaccard similarity of two near texts."""
_NEAR_COLOR = 8.0
_FLAT = 2
"""Smaller steps of brightness are none: on flat areas, noise of compression would decide bits."""
_PLACES = 16
_NEAR_PLACE = 40
"""Largest difference of brightness, or of a colour from it, in any place of two near pictures.
Over 99 % of easy-vqa's and Tux Paint's pictures are found again as JPEG or WebP at quality 60 to 85
and 0.75 to 1.7 times as large; no two different pictures of easy-vqa's test set are taken for one
another."""
_LUMA = (0.299, 0.587, 0.114)
_DECODE_SIDE = 64
_THUMBNAIL = 4
_BANDS = (11, 11, 11, 11, 10, 10)
_SHINGLE = 3
_PERMUTATIONS = 64
_ROWS = 4
_CHUNK_SHINGLES = 1 << 20
_PAIRS_AT_ONCE = 1 << 22
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
# A candidate by minhash is looked at if this much of its signature agrees; the estimate's standard
# deviation at 0.8 is 0.05, so this is four of them below.
_ESTIMATE = NEAR_TEXT - 0.2


def picture_hash(data: bytes) -> tuple[int, np.ndarray]:
    """(difference hash, uint8 [48] thumbnail) of an encoded picture, turned upright.

    Raises:
        ImageError: the picture cannot be decoded.
    """
    image = Image.fromarray(decode_rgb(data, image_size=_DECODE_SIDE))
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1] + _FLAT)
    small = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return int.from_bytes(bits.tobytes(), "big"), np.asarray(small).reshape(-1)


def picture_places(data: bytes) -> np.ndarray:
    """int16 [16, 16, 4]: brightness, and red, green and blue less it, of each place of a picture.

    Raises:
        ImageError: the picture cannot be decoded.
    """
    pixels = decode_rgb(data, image_size=_DECODE_SIDE).astype(np.float64)
    inside = _DECODE_SIDE // _PLACES
    mean = pixels.reshape(_PLACES, inside, _PLACES, inside, 3).mean(axis=(1, 3))
    luma = mean @ np.array(_LUMA)
    return np.rint(np.dstack([luma, mean - luma[..., None]])).astype(np.int16)


def same_places(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures show the same everywhere."""
    return int(np.abs(one - other).max()) <= _NEAR_PLACE


def _band_keys(hashes: np.ndarray) -> list[np.ndarray]:
    """Keys of which at least one agrees if two hashes differ in at most 4 bits.

    Four wrong bits touch at most four of six bands, so two bands agree: one table for each pair.
    """
    bands, shift = [], 0
    for width in _BANDS:
        bands.append((hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1))
        shift += width
    return [(a << np.uint64(11)) | b for a, b in combinations(bands, 2)]


def _near_pairs(hashes: np.ndarray, thumbnails: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Pairs [n, 2] of `members` (ascending) that are near each other."""
    found = []
    step = max(1, _PAIRS_AT_ONCE // len(members))
    for start in range(0, len(members), step):
        left = members[start : start + step]
        close = np.bitwise_count(hashes[left][:, None] ^ hashes[members][None]) <= NEAR_BITS
        a, b = np.nonzero(close & (left[:, None] < members[None]))
        pairs = np.stack([left[a], members[b]], axis=1)
        for begin in range(0, len(pairs), _PAIRS_AT_ONCE // 48):
            some = pairs[begin : begin + _PAIRS_AT_ONCE // 48]
            colors = thumbnails.astype(np.int16)[some]
            distance = np.abs(colors[:, 0] - colors[:, 1]).mean(axis=1)
            found.append(some[distance <= _NEAR_COLOR])
    return np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)


def _buckets(keys: np.ndarray) -> list[np.ndarray]:
    """Ascending places of each key that stands more than once."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    return [bucket for bucket in np.split(order, edges) if len(bucket) > 1]


def near_pictures(
    hashes: np.ndarray,
    thumbnails: np.ndarray,
    *,
    alike: Callable[[int, int], bool],
    references: int = 0,
) -> np.ndarray:
    """Place of the first near picture of each, or its own: int64 [n].

    Args:
        hashes: uint64 [n].
        thumbnails: uint8 [n, 48].
        alike: the second look at two candidates, by their places.
    """
    neighbours: dict[int, set[int]] = defaultdict(set)
    for keys in _band_keys(hashes):
        for bucket in _buckets(keys):
            for a, b in _near_pairs(hashes, thumbnails, bucket).tolist():
                neighbours[b].add(a)
    twins = np.arange(len(hashes))
    for place in sorted(place for place in neighbours if place >= references):
        kept = sorted(other for other in neighbours[place] if twins[other] == other)
        twins[place] = next((other for other in kept if alike(place, other)), place)
    return twins


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: spreads uint64 values."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


def shingles(text: np.ndarray) -> np.ndarray:
    """Hashes of all token triples, each once, ascending; of the whole text if it is shorter."""
    tokens = text.astype(np.uint64) + np.uint64(1)
    width = max(1, min(_SHINGLE, len(tokens)))
    count = max(1, len(tokens) - width + 1)
    state = np.full(count, np.uint64(len(tokens) if len(tokens) < _SHINGLE else 0))
    for offset in range(min(width, len(tokens))):
        state = _mix(state * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + count])
    return np.unique(state)


def _signatures(sets: Sequence[np.ndarray]) -> np.ndarray:
    """Minhashes: uint32 [n, permutations]."""
    result = np.empty((len(sets), _PERMUTATIONS), dtype=np.uint32)
    start = 0
    while start < len(sets):
        end, total = start, 0
        while end < len(sets) and (end == start or total + len(sets[end]) <= _CHUNK_SHINGLES):
            total += len(sets[end])
            end += 1
        flat = np.concatenate(sets[start:end])
        lengths = np.array([len(one) for one in sets[start:end]])
        begins = np.cumsum(lengths) - lengths
        for number in range(_PERMUTATIONS):
            salt = np.uint64((number + 1) * 0xD1342543DE82EF95 & 0xFFFFFFFFFFFFFFFF)
            result[start:end, number] = np.minimum.reduceat(
                (_mix(flat ^ salt) >> np.uint64(32)).astype(np.uint32), begins
            )
        start = end
    return result


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared part of two ascending sets."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def near_texts(texts: Sequence[np.ndarray], *, references: int = 0) -> np.ndarray:
    """Place of the first near text of each, or its own: int64 [n].

    Args:
        texts: token ids of each text; equal texts need not be sorted out before, but should be.
    """
    twins = np.arange(len(texts))
    if not len(texts):
        return twins
    sets = [shingles(text) for text in texts]
    signatures = _signatures(sets)
    bands = [
        np.ascontiguousarray(signatures[:, start : start + _ROWS]).view(f"V{4 * _ROWS}").ravel()
        for start in range(0, _PERMUTATIONS, _ROWS)
    ]
    kept: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in bands]
    for place in range(len(texts)):
        keys = [band[place].tobytes() for band in bands]
        met = {other for table, key in zip(kept, keys, strict=True) for other in table.get(key, ())}
        candidates = np.array(sorted(met), dtype=np.int64)
        agree = (signatures[candidates] == signatures[place]).mean(axis=1)
        for other in candidates[agree >= _ESTIMATE].tolist() if place >= references else ():
            if jaccard(sets[other], sets[place]) >= NEAR_TEXT:
                twins[place] = other
                break
        else:
            for table, key in zip(kept, keys, strict=True):
                table[key].append(place)
    return twins
