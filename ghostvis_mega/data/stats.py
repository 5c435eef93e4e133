"""What a dataset holds, how well it packs and how evenly it loads ranks, as one dictionary."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.data.dataset import Dataset, ranges
from ghostvis_mega.data.layout import ImageFormat, Role
from ghostvis_mega.data.looks.balance import simulate
from ghostvis_mega.data.looks.mix import ghostvis_mix
from ghostvis_mega.data.looks.packing import (
    STRATEGIES,
    Packed,
    Samples,
    dataset_strategies,
    pack_dataset,
    pack_samples,
    packing_stats,
)
from ghostvis_mega.data.manifest import REJECTS
from ghostvis_mega.data.plan import PlanParams, TooLong, align_up, check_alignment

DATA_PARALLEL = (8, 32, 512)
PATCHES_PER_IMAGE = 576
"""Of a 336-pixel picture in patches of 14, as SigLIP so400m sees it."""

MIX = "ghostvis-mix"
MIX_SAMPLES = 200_000
_DATASET_WASTE, _MIX_WASTE = 0.015, 0.010
_IMAGES_SD, _TOWER, _TOTAL = 0.35, 1.10, 1.05
_BAR_RANKS = (8, 32)
_PERCENTILES = (1, 25, 50, 75, 99)
_LENGTH_BINS = 48
_MAX_RESOLUTIONS = 600
_TOP_IMAGES = 12


def _spread(values: np.ndarray) -> dict[str, float]:
    """Mean, deviation, extremes and percentiles."""
    if not len(values):
        return {}
    marks = np.percentile(values, _PERCENTILES)
    return {
        "mean": round(float(values.mean()), 3),
        "sd": round(float(values.std()), 3),
        "min": int(values.min()),
        **{f"p{mark}": round(float(v), 1) for mark, v in zip(_PERCENTILES, marks, strict=True)},
        "max": int(values.max()),
    }


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Counts between edges; bins are whole numbers wide."""
    low, high = int(values.min()), int(values.max()) + 1
    width = max(1, -(-(high - low) // _LENGTH_BINS))
    edges = np.arange(low, high + width, width)
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}


def _packing(
    packed: dict[str, Packed],
    *,
    seq_length: int,
    patches_per_image: int,
    data_parallel: Sequence[int],
    seed: int,
    waste_limit: float,
) -> dict[str, Any]:
    """Parts of the statistics that follow from packing, with the bars that they are held to."""
    sizes = {"seq_length": seq_length, "patches_per_image": patches_per_image}
    strategies = {name: packing_stats(each, **sizes) for name, each in packed.items()}
    balance = [
        simulate(
            packed["balanced"], data_parallel=ranks, patches_per_image=patches_per_image, seed=seed
        )
        for ranks in data_parallel
    ]
    return {
        **sizes,
        "packing": strategies,
        "balance": balance,
        "bars": _bars(strategies["balanced"], balance, waste_limit),
    }


def _bars(balanced: dict[str, Any], balance: list[dict[str, Any]], waste: float) -> list[Any]:
    """Targets of `balanced`: what is measured, the most it may be, and whether it is."""
    images = balanced["images_per_sequence"]
    bars = [("padding waste", balanced["padding_waste"], waste)]
    if images["mean"]:
        bars.append(("images a sequence, sd / mean", images["sd"] / images["mean"], _IMAGES_SD))
    for row in balance:
        if row["data_parallel"] in _BAR_RANKS:
            where = f"max / mean over {row['data_parallel']} ranks"
            bars.append((f"tower cost, {where}", row["assigned"]["tower"], _TOWER))
            bars.append((f"total cost, {where}", row["assigned"]["total"], _TOTAL))
    return [
        {"name": name, "value": round(value, 5), "limit": limit, "ok": value <= limit}
        for name, value, limit in bars
    ]


def mix_stats(
    *,
    seq_length: int,
    tokens_per_image: int,
    seed: int,
    patches_per_image: int = PATCHES_PER_IMAGE,
    data_parallel: Sequence[int] = DATA_PARALLEL,
    segment_align: int = 1,
    count: int = MIX_SAMPLES,
) -> dict[str, Any]:
    """Packing and balance of the synthetic GhostVis mix (`looks.mix`), without a dataset."""
    check_alignment(seq_length, segment_align)
    lengths, images = ghostvis_mix(
        count, seq_length=seq_length, tokens_per_image=tokens_per_image, seed=seed
    )
    samples = Samples(lengths, images)
    packed = {
        name: pack_samples(
            samples, strategy=name, seq_length=seq_length, seed=seed, segment_align=segment_align
        )
        for name in STRATEGIES
    }
    return {
        "path": f"{MIX} (synthetic lengths)",
        "samples": len(lengths),
        "length": _spread(lengths),
        "length_histogram": _histogram(lengths),
        "tokens_per_image": tokens_per_image,
        "too_long": count - len(lengths),
        "segment_align": segment_align,
        "alignment_padding": _alignment_padding(lengths, segment_align),
        **_packing(
            packed,
            seq_length=seq_length,
            patches_per_image=patches_per_image,
            data_parallel=data_parallel,
            seed=seed,
            waste_limit=_MIX_WASTE,
        ),
    }


def dataset_stats(
    dataset: Dataset,
    *,
    seq_length: int,
    tokens_per_image: int,
    seed: int,
    patches_per_image: int = PATCHES_PER_IMAGE,
    data_parallel: Sequence[int] = DATA_PARALLEL,
    segment_align: int = 1,
    too_long: TooLong = "drop",
) -> dict[str, Any]:
    """Content, lengths, packing and balance of a dataset; JSON types only.

    Raises:
        DataError: no sample fits into `seq_length`, or an index is damaged.
    """
    records = dataset.sample_index
    lengths = dataset.lengths(tokens_per_image=tokens_per_image)
    ids, counts = dataset.image_ids(np.arange(len(records)))
    samples = Samples(lengths, counts, ids)
    params = PlanParams(
        "balanced",
        seq_length,
        tokens_per_image,
        seed,
        segment_align=segment_align,
        too_long=too_long,
    )
    packed = {
        name: pack_dataset(dataset, samples, strategy=name, params=params)
        for name in dataset_strategies(dataset, params)
    }
    return {
        "path": str(dataset.path),
        "counts": dataset.manifest.counts.model_dump(),
        "vocab_size": dataset.manifest.tokenizer.vocab_size,
        "trained_share": round(float(records["trained_len"].sum()) / max(1, lengths.sum()), 5),
        "text_only_samples": int(np.count_nonzero(counts == 0)),
        "several_images_samples": int(np.count_nonzero(counts > 1)),
        "text_length": _spread(records["tok_len"]),
        "length": _spread(lengths),
        "length_histogram": _histogram(lengths),
        "tokens_per_image": tokens_per_image,
        "too_long": int(np.count_nonzero(lengths > seq_length)),
        "too_long_policy": too_long,
        "segment_align": segment_align,
        "alignment_padding": _alignment_padding(lengths[lengths <= seq_length], segment_align),
        "repeated_samples": len(records) - len(np.unique(records["text_hash"])),
        "tokens": _token_kinds(dataset, tokens_per_image),
        "sources": _sources(dataset, tokens_per_image),
        "rejects": _rejects(dataset.path / REJECTS),
        **_images(dataset, ids),
        **_packing(
            packed,
            seq_length=seq_length,
            patches_per_image=patches_per_image,
            data_parallel=data_parallel,
            seed=seed,
            waste_limit=_DATASET_WASTE,
        ),
    }


def _alignment_padding(lengths: np.ndarray, segment_align: int) -> int:
    """Positions of padding inside of the samples' own segments."""
    return int((align_up(lengths, segment_align) - lengths).sum())


def _token_kinds(dataset: Dataset, tokens_per_image: int) -> dict[str, int]:
    """Positions of the whole dataset by what stands there, images expanded."""
    spans = dataset.spans
    by_role = np.bincount(spans["role"], weights=spans["len"], minlength=max(Role) + 1)
    by_role = by_role.astype(np.int64) - _sentinels_by_role(dataset)
    kinds = {role.name.lower(): int(by_role[role]) for role in Role if by_role[role]}
    images = len(dataset.image_refs)
    text = int(dataset.sample_index["tok_len"].sum()) - images
    kinds["template"] = text - sum(kinds.values())
    kinds["image"] = images * tokens_per_image
    return kinds


def _sentinels_by_role(dataset: Dataset) -> np.ndarray:
    """How many pictures stand in spans of each role: int64 [roles]; those in none are no one's."""
    records, spans = dataset.sample_index, dataset.spans
    offsets = records["tok_off"].astype(np.int64)
    filled = ranges(records["span_off"].astype(np.int64), records["n_spans"].astype(np.int64))
    starts = spans["start"][filled] + np.repeat(offsets, records["n_spans"])
    held = ranges(records["img_off"].astype(np.int64), records["n_images"].astype(np.int64))
    places = dataset.image_refs["pos"][held] + np.repeat(offsets, records["n_images"])
    some = np.flatnonzero(spans["len"][filled])  # an empty span holds nothing
    some = some[np.argsort(starts[some], kind="stable")]
    if not len(some):
        return np.zeros(max(Role) + 1, dtype=np.int64)
    last = some[np.maximum(np.searchsorted(starts[some], places, side="right") - 1, 0)]
    inside = (starts[last] <= places) & (places < starts[last] + spans["len"][filled][last])
    roles = spans["role"][filled][last[inside]]
    return np.bincount(roles, minlength=max(Role) + 1).astype(np.int64)


def _sources(dataset: Dataset, tokens_per_image: int) -> list[dict[str, Any]]:
    records = dataset.sample_index
    number, width = records["source"].astype(np.int64), len(dataset.manifest.sources)

    def per_source(values: np.ndarray | None = None) -> list[int]:
        return np.bincount(number, weights=values, minlength=width).astype(np.int64).tolist()

    columns = (
        per_source(),
        per_source(records["tok_len"].astype(np.int64) - records["n_images"]),
        per_source(records["n_images"].astype(np.int64) * tokens_per_image),
        per_source(records["trained_len"]),
    )
    return [
        {
            **source.model_dump(),
            "samples": samples,
            "text_tokens": text,
            "image_positions": image,
            "trained_tokens": trained,
        }
        for source, samples, text, image, trained in zip(
            dataset.manifest.sources, *columns, strict=True
        )
    ]


def _rejects(ledger: Path) -> dict[str, int]:
    """Rows of the ledger by reason, most frequent first."""
    with open(ledger, encoding="ascii") as file:
        reasons = Counter(json.loads(line)["reason"] for line in file)
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def _images(dataset: Dataset, ids: np.ndarray) -> dict[str, Any]:
    """Formats, sizes, and the images that most samples ask about."""
    images = dataset.image_index
    formats = np.bincount(images["format"], minlength=max(ImageFormat) + 1)
    sizes = np.stack([images["width"], images["height"]], axis=1).astype(np.int64)
    cells, counts = np.unique(sizes, axis=0, return_counts=True)
    largest = np.sort(np.argsort(-counts, kind="stable")[:_MAX_RESOLUTIONS])
    uses = np.bincount(ids, minlength=len(images))
    top = np.argsort(-uses, kind="stable")[:_TOP_IMAGES]
    return {
        "samples_per_image": round(len(ids) / max(1, len(images)), 3),
        "image_formats": {fmt.name: int(formats[fmt]) for fmt in ImageFormat if formats[fmt]},
        "image_width": _spread(images["width"]),
        "image_height": _spread(images["height"]),
        "distinct_resolutions": len(cells),
        "resolutions": np.column_stack([cells, counts])[largest].tolist(),
        "top_images": [
            {"image": image, "places": int(uses[image])} for image in top.tolist() if uses[image]
        ],
    }
