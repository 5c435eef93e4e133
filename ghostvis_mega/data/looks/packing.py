"""Six ways to put the same samples into sequences, and what each costs.

`none` gives each sample a sequence of its own; `pad-to-longest` takes rows of eight samples as they
come and pads each to its longest; `next-fit` opens a new sequence when the next sample does not
fit; `bfd`, `balanced` and `concat`, which cuts samples, are what training can use.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ghostvis_mega.data.dataset import Dataset, ranges
from ghostvis_mega.data.order import shuffled
from ghostvis_mega.data.packing import Ragged, pack_balanced, pack_bfd
from ghostvis_mega.data.plan import PackPlan, PlanParams, align_up, load_or_build

STRATEGIES = ("none", "pad-to-longest", "next-fit", "bfd", "balanced")
"""Of lengths alone."""
PLANNED = ("none", "bfd", "balanced", "concat")
"""Those that a stored plan of a dataset can have."""
LONGEST_OF = 8
_ORDER_KEY = 3
_SHUFFLE_KEY = 4
_FILL_BINS = 40


@dataclass(frozen=True)
class Samples:
    """What decides packing: lengths with images expanded, and the images of each sample.

    `image_ids` are those of all samples, joined; without them every image is another one.
    """

    lengths: np.ndarray  # int64 [samples]
    images: np.ndarray  # int64 [samples]
    image_ids: np.ndarray | None = None  # int64 [sum of images]


@dataclass(frozen=True)
class Packed:
    """Sequences of one strategy; arrays have one entry a sequence."""

    slots: np.ndarray  # int64: positions, useful or not
    tokens: np.ndarray  # int64: useful positions
    segments: np.ndarray  # int64: samples
    images: np.ndarray  # int64: image places
    distinct: np.ndarray  # int64: images that the tower encodes
    sumsq: np.ndarray  # float64: sum of squared sample lengths

    @property
    def waste(self) -> float:
        """Share of positions that hold padding."""
        return 1.0 - float(self.tokens.sum()) / max(1, int(self.slots.sum()))


def pack_samples(
    samples: Samples, *, strategy: str, seq_length: int, seed: int, segment_align: int = 1
) -> Packed:
    """Sequences of samples that all fit into `seq_length`, none grouped by image."""
    everyone = np.arange(len(samples.lengths))
    sizes = align_up(samples.lengths, segment_align)
    if strategy == "none":
        order, segments = everyone, np.ones(len(everyone), dtype=np.int64)
    elif strategy == "pad-to-longest":
        return _pad_to_longest(samples, seed=seed, segment_align=segment_align)
    elif strategy == "next-fit":
        order = shuffled(len(everyone), seed, _ORDER_KEY)
        segments = _next_fit(sizes[order], seq_length)
    else:
        if strategy == "bfd":
            packs = pack_bfd(sizes, everyone, capacity=seq_length, seed=seed)
        else:
            units = Ragged.singles(everyone)
            packs = pack_balanced(sizes, units, capacity=seq_length, seed=seed)
        packs = packs.take(shuffled(len(packs), seed, _SHUFFLE_KEY))
        segments, order = packs.counts, packs.values
    return _measure(samples, order, segments, seq_length)


def pack_dataset(
    dataset: Dataset, samples: Samples, *, strategy: str, params: PlanParams
) -> Packed:
    """As `pack_samples`, with the plan that training would use where the strategy has one."""
    kept = np.flatnonzero(samples.lengths <= params.seq_length)
    if strategy in PLANNED:
        fields = {**params.__dict__, "algorithm": strategy}
        return _planned(load_or_build(dataset, PlanParams(**fields)))
    return pack_samples(
        select(samples, kept),
        strategy=strategy,
        seq_length=params.seq_length,
        seed=params.seed,
        segment_align=params.segment_align,
    )


def dataset_strategies(dataset: Dataset, params: PlanParams) -> tuple[str, ...]:
    """All that the dataset can be packed by; a picture that fills more than one sequence cannot be
    concatenated."""
    fits = not dataset.num_images or params.tokens_per_image <= params.seq_length
    return (*STRATEGIES, "concat") if fits else STRATEGIES


def _planned(plan: PackPlan) -> Packed:
    """Costs that a plan has counted."""
    return Packed(
        slots=np.full(plan.num_packs, plan.params.seq_length, dtype=np.int64),
        tokens=plan.tokens.astype(np.int64),
        segments=plan.segments.astype(np.int64),
        images=plan.images.astype(np.int64),
        distinct=plan.distinct_images.astype(np.int64),
        sumsq=plan.sumsq.astype(np.float64),
    )


def select(samples: Samples, chosen: np.ndarray) -> Samples:
    """Some of the samples, in the given order."""
    ids = samples.image_ids
    if ids is not None:
        starts = np.cumsum(samples.images) - samples.images
        ids = ids[ranges(starts[chosen], samples.images[chosen])]
    return Samples(samples.lengths[chosen], samples.images[chosen], ids)


def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    segments, count, free = [], 0, capacity
    for length in lengths.tolist():
        if length > free:
            segments.append(count)
            count, free = 0, capacity
        count += 1
        free -= length
    return np.array([*segments, count], dtype=np.int64)


def _pad_to_longest(samples: Samples, *, seed: int, segment_align: int) -> Packed:
    order = shuffled(len(samples.lengths), seed, _ORDER_KEY)
    ones = np.ones(len(order), dtype=np.int64)
    packed = _measure(samples, order, ones, 0)
    padded = align_up(packed.tokens, segment_align)
    longest = np.maximum.reduceat(padded, np.arange(0, len(order), LONGEST_OF))
    slots = np.repeat(longest, LONGEST_OF)[: len(order)]
    return Packed(slots, *(getattr(packed, name) for name in _COSTS))


_COSTS = ("tokens", "segments", "images", "distinct", "sumsq")


def _measure(samples: Samples, order: np.ndarray, segments: np.ndarray, seq_length: int) -> Packed:
    """Costs of sequences that take `segments` samples each from `order`."""
    chosen = select(samples, order)
    starts = np.cumsum(segments) - segments
    images = np.add.reduceat(chosen.images, starts)
    distinct = images
    if chosen.image_ids is not None:
        distinct = np.zeros_like(images)
        if len(chosen.image_ids):
            count = int(chosen.image_ids.max()) + 1
            sequence_of = np.repeat(np.arange(len(segments)), images)
            pairs = np.unique(sequence_of * count + chosen.image_ids)
            distinct = np.bincount(pairs // count, minlength=len(segments))
    return Packed(
        slots=np.full(len(segments), seq_length, dtype=np.int64),
        tokens=np.add.reduceat(chosen.lengths, starts),
        segments=segments,
        images=images,
        distinct=distinct,
        sumsq=np.add.reduceat(chosen.lengths.astype(np.float64) ** 2, starts),
    )


def mean_sd(values: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of one number a sequence."""
    return {"mean": round(float(values.mean()), 4), "sd": round(float(values.std()), 4)}


def packing_stats(packed: Packed, *, seq_length: int, patches_per_image: int) -> dict[str, Any]:
    """Numbers of one strategy; JSON types only."""
    bound = -(-int(packed.tokens.sum()) // seq_length)
    fill = packed.tokens / np.maximum(packed.slots, 1)
    histogram, _ = np.histogram(fill, bins=_FILL_BINS, range=(0.0, 1.0))
    return {
        "sequences": len(packed.tokens),
        "lower_bound": bound,
        "positions": int(packed.slots.sum()),
        "fill": round(1 - packed.waste, 5),
        "padding_waste": round(packed.waste, 5),
        "bound_waste": round(1 - int(packed.tokens.sum()) / max(1, bound * seq_length), 5),
        "fill_histogram": histogram.tolist(),
        "samples_per_sequence": mean_sd(packed.segments),
        "images_per_sequence": mean_sd(packed.images),
        "distinct_images_per_sequence": mean_sd(packed.distinct),
        "patches_per_sequence": mean_sd(packed.distinct * patches_per_image),
        "tower_images_per_epoch": int(packed.distinct.sum()),
    }
