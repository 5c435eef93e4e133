"""Finds samples that are there twice, and samples of a training set that an evaluation set holds.

A sample is a duplicate if its pictures (all of them, in order) and its text are those of an
earlier sample, each exactly or nearly as asked. It leaks if one of its pictures is in the other
set, or, for samples without pictures, its text: questions repeat over pictures, so their text alone
says nothing.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.layout import Role
from ghostvis_mega.data.operations.copying import Dropped, check_compatible
from ghostvis_mega.data.operations.similarity import (
    near_pictures,
    near_texts,
    picture_hash,
    picture_places,
    same_places,
)
from ghostvis_mega.utils.errors import DataError

Match = Literal["exact", "near", "ignore"]
Progress = Callable[[int, int], None]
_EXAMPLES = 20
_LOOKS_KEPT = 1 << 16
"""Second looks at pictures that stay in memory, 2 KB each."""


@dataclass(frozen=True)
class DedupeParams:
    """How alike pictures and text must be; "ignore" leaves one of them out."""

    images: Match = "exact"
    text: Match = "exact"

    def __post_init__(self) -> None:
        if self.images == self.text == "ignore":
            raise DataError("images and text are both ignored: nothing is left to compare")


@dataclass
class Duplicates:
    """The outcome: what to keep, what to drop and why."""

    keep: np.ndarray  # int64, ascending
    dropped: tuple[Dropped, ...]
    counts: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)

    def report(self, dataset: Dataset) -> dict[str, Any]:
        """JSON for people: counts, seconds, and the first examples by key."""
        return {
            "dataset": str(dataset.path),
            "samples": dataset.num_samples,
            "found": len(self.dropped),
            "kept": len(self.keep),
            "counts": self.counts,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "examples": [
                {
                    "key": dataset.sample_key(one.index)[0],
                    "reason": one.reason,
                    "like": one.detail,
                }
                for one in self.dropped[:_EXAMPLES]
            ],
        }


def _first_of(values: list[Hashable]) -> np.ndarray:
    """Place of the first equal value of each."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(value, place) for place, value in enumerate(values)], np.int64)


class _Pool:
    """Pictures and texts of several datasets under common numbers, first datasets first."""

    def __init__(self, datasets: list[Dataset]):
        self.datasets = datasets
        self.owner = [
            (number, index)
            for number, dataset in enumerate(datasets)
            for index in range(dataset.num_samples)
        ]
        self.seconds: dict[str, float] = {}
        hashes: list[Hashable] = [
            value.tobytes() for dataset in datasets for value in dataset.image_index["blake2b"]
        ]
        self.exact_images = _first_of(hashes)
        starts = np.cumsum([0, *(dataset.num_images for dataset in datasets)])
        self.image_dataset = np.repeat(np.arange(len(datasets)), np.diff(starts))
        self._image_starts = starts.tolist()
        self.images = self._sample_images()

    def _sample_images(self) -> list[tuple[int, ...]]:
        result = []
        for start, dataset in zip(self._image_starts, self.datasets, strict=False):
            flat, counts = dataset.image_ids(np.arange(dataset.num_samples))
            pieces = np.split(flat + start, np.cumsum(counts)[:-1])
            result += [tuple(piece.tolist()) for piece in pieces]
        return result

    def near_images(self, progress: Progress | None) -> np.ndarray:
        """First near picture of each picture; exact twins are decoded once."""
        started = time.monotonic()
        fresh = np.flatnonzero(self.exact_images == np.arange(len(self.exact_images)))
        hashes = np.empty(len(fresh), dtype=np.uint64)
        thumbnails = np.empty((len(fresh), 48), dtype=np.uint8)
        for place, image in enumerate(fresh.tolist()):
            hashes[place], thumbnails[place] = picture_hash(self._image_bytes(image))
            if progress is not None:
                progress(place + 1, len(fresh))
        self.seconds["hash_images"] = time.monotonic() - started
        started = time.monotonic()

        @lru_cache(_LOOKS_KEPT)
        def look(place: int) -> np.ndarray:
            return picture_places(self._image_bytes(int(fresh[place])))

        near = fresh[
            near_pictures(
                hashes,
                thumbnails,
                alike=lambda one, other: same_places(look(one), look(other)),
                references=self._references(fresh, "images"),
            )
        ]
        self.seconds["compare_images"] = time.monotonic() - started
        twins = np.empty(len(self.exact_images), dtype=np.int64)
        twins[fresh] = near
        return twins[self.exact_images]

    def _image_bytes(self, image: int) -> bytes:
        number = int(self.image_dataset[image])
        return self.datasets[number].image_bytes(image - self._image_starts[number])

    def _references(self, fresh: np.ndarray, what: Literal["images", "samples"]) -> int:
        """How many of `fresh` belong to the set that another one is compared with."""
        if len(self.datasets) == 1:
            return 0
        first = self.datasets[0]
        count = first.num_images if what == "images" else first.num_samples
        return int(np.searchsorted(fresh, count))

    def texts(self, match: Match) -> np.ndarray:
        """First sample with the same (or nearly the same) turns of each sample."""
        started = time.monotonic()
        tokens = [self._text(number, index) for number, index in self.owner]
        first = _first_of(
            [hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in tokens]
        )
        if match == "near":
            fresh = np.flatnonzero(first == np.arange(len(first)))
            twins = np.arange(len(first))
            some = [tokens[place] for place in fresh.tolist()]
            references = self._references(fresh, "samples")
            twins[fresh] = fresh[near_texts(some, references=references)]
            first = twins[first]
        self.seconds["texts"] = time.monotonic() - started
        return first

    def _text(self, number: int, index: int) -> np.ndarray:
        """Tokens of all turns with the places of pictures, a mark with the role before each."""
        sample = self.datasets[number].sample(index)
        pieces = []
        for span in sample.spans[sample.spans["role"] != Role.EOS]:
            start = int(span["start"])
            mark = np.array([(1 << 24) + int(span["role"])], dtype=np.int32)
            pieces += [mark, sample.tokens[start : start + int(span["len"])]]
        return np.concatenate(pieces) if pieces else sample.tokens


def find_duplicates(
    dataset: Dataset,
    params: DedupeParams,
    *,
    without: Collection[int] = (),
    progress: Progress | None = None,
) -> Duplicates:
    """Samples that an earlier sample of the same dataset makes superfluous.

    Args:
        without: samples that are dropped already: neither kept nor compared with.
    """
    pool = _Pool([dataset])
    images = pool.near_images(progress) if params.images == "near" else pool.exact_images
    texts = None if params.text == "ignore" else pool.texts(params.text)
    first: dict[Hashable, int] = {}
    keep, dropped = [], []
    for index, ids in enumerate(pool.images):
        if index in without:
            continue
        if params.text == "ignore" and not ids:  # no picture, so nothing to compare
            keep.append(index)
            continue
        pictures = () if params.images == "ignore" else tuple(images[list(ids)].tolist())
        signature = (pictures, None if texts is None else int(texts[index]))
        earlier = first.setdefault(signature, index)
        if earlier == index:
            keep.append(index)
        else:
            like, _ = dataset.sample_key(earlier)
            dropped.append(Dropped(index, "duplicate", like))
    counts = {
        "duplicate_samples": len(dropped),
        "pictures_like_an_earlier_one": int((images != np.arange(len(images))).sum()),
    }
    if texts is not None:
        counts["texts_like_an_earlier_one"] = int((texts != np.arange(len(texts))).sum())
    return Duplicates(np.array(keep, dtype=np.int64), tuple(dropped), counts, pool.seconds)


def find_leaks(
    dataset: Dataset, other: Dataset, params: DedupeParams, *, progress: Progress | None = None
) -> Duplicates:
    """Samples of `dataset` that `other` holds: the check of training data against evaluation data.

    Raises:
        DataError: text is compared and the tokenizers differ.
    """
    if params.text != "ignore":
        check_compatible([other, dataset])
    pool = _Pool([other, dataset])
    images = pool.near_images(progress) if params.images == "near" else pool.exact_images
    leaked_image = (images < other.num_images) & (params.images != "ignore")
    texts = None if params.text == "ignore" else pool.texts(params.text)
    offset = other.num_samples
    keep, dropped = [], []
    reasons = {"leaked_image": 0, "leaked_text": 0, "same_text_other_picture": 0}
    for index in range(dataset.num_samples):
        ids = pool.images[offset + index]
        hit = [image for image in ids if leaked_image[image]]
        text = None if texts is None else int(texts[offset + index])
        text = text if text is not None and text < offset else None
        if hit:
            reason, detail = "leaked_image", f"image {int(images[hit[0]])} of {other.path.name}"
        elif text is not None and (not ids or params.images == "ignore"):
            reason, detail = "leaked_text", f"{other.sample_key(text)[0]} of {other.path.name}"
        else:
            reasons["same_text_other_picture"] += int(text is not None)
            keep.append(index)
            continue
        reasons[reason] += 1
        dropped.append(Dropped(index, reason, detail))
    return Duplicates(np.array(keep, dtype=np.int64), tuple(dropped), reasons, pool.seconds)
