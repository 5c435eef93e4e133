"""What a dataset holds and how well it packs, as one dictionary and as text."""

from typing import Any

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.layout import ImageFormat
from ghostvis_mega.data.plan import ALGORITHMS, PackPlan, PlanParams, build_plan

_PERCENTILES = (1, 25, 50, 75, 99)


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


def _plan_stats(plan: PackPlan, bound: int) -> dict[str, Any]:
    return {
        "sequences": plan.num_packs,
        "lower_bound": bound,
        "fill": round(plan.fill, 5),
        "padding_waste": round(1 - plan.fill, 5),
        "samples_per_sequence": _spread(plan.segments),
        "images_per_sequence": _spread(plan.images),
        "distinct_images_per_sequence": _spread(plan.distinct_images),
        "tower_images_per_epoch": int(plan.distinct_images.sum()),
    }


def dataset_stats(
    dataset: Dataset, *, seq_length: int, tokens_per_image: int, seed: int
) -> dict[str, Any]:
    """Counts, lengths and the result of each packing algorithm; JSON types only."""
    records, images = dataset.sample_index, dataset.image_index
    lengths = dataset.lengths(tokens_per_image=tokens_per_image)
    kept = lengths[lengths <= seq_length]
    bound = -(-int(kept.sum()) // seq_length)
    plans = {}
    for algorithm in ALGORITHMS:
        params = PlanParams(
            algorithm=algorithm,
            seq_length=seq_length,
            tokens_per_image=tokens_per_image,
            seed=seed,
        )
        plans[algorithm] = _plan_stats(build_plan(dataset, params), bound)
    formats = np.bincount(images["format"], minlength=max(ImageFormat) + 1)
    sources = records["source"].astype(np.int64)
    return {
        "path": str(dataset.path),
        "counts": dataset.manifest.counts.model_dump(),
        "sources": [
            {**source.model_dump(), "samples": int(np.count_nonzero(sources == number))}
            for number, source in enumerate(dataset.manifest.sources)
        ],
        "vocab_size": dataset.manifest.tokenizer.vocab_size,
        "trained_share": round(float(records["trained_len"].sum()) / max(1, lengths.sum()), 5),
        "text_only_samples": int(np.count_nonzero(records["n_images"] == 0)),
        "several_images_samples": int(np.count_nonzero(records["n_images"] > 1)),
        "samples_per_image": round(len(dataset.image_refs) / max(1, dataset.num_images), 3),
        "image_formats": {fmt.name: int(formats[fmt]) for fmt in ImageFormat if formats[fmt]},
        "image_width": _spread(images["width"]),
        "image_height": _spread(images["height"]),
        "text_length": _spread(records["tok_len"]),
        "length": _spread(lengths),
        "seq_length": seq_length,
        "tokens_per_image": tokens_per_image,
        "too_long": int(len(lengths) - len(kept)),
        "packing": plans,
    }


def _spread_text(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in spread.items()) or "none"


def stats_text(stats: dict[str, Any]) -> str:
    """The same for people, a few lines."""
    counts = stats["counts"]
    formats = ", ".join(f"{count} {name}" for name, count in stats["image_formats"].items())
    lines = [
        stats["path"],
        f"  samples   {counts['samples']} ({stats['text_only_samples']} text only, "
        f"{stats['several_images_samples']} with several images), {counts['rejected']} rejected",
        f"  images    {counts['images']} ({formats or 'none'}), "
        f"{stats['samples_per_image']:g} samples an image",
        f"  width     {_spread_text(stats['image_width'])}",
        f"  height    {_spread_text(stats['image_height'])}",
        f"  tokens    {counts['tokens']} stored, vocabulary {stats['vocab_size']}, "
        f"{100 * stats['trained_share']:.1f} % of positions trained",
        f"  length    {_spread_text(stats['length'])} (an image is {stats['tokens_per_image']})",
        f"  too long  {stats['too_long']} for {stats['seq_length']}",
    ]
    lines += [
        f"  source    {source['name']}: {source['samples']} samples, {source['rejected']} rejected"
        for source in stats["sources"]
    ]
    lines.append(f"  packing into {stats['seq_length']}:")
    for name, plan in stats["packing"].items():
        images, distinct = plan["images_per_sequence"], plan["distinct_images_per_sequence"]
        lines.append(
            f"    {name:9} {plan['sequences']} sequences (at least {plan['lower_bound']}), "
            f"padding waste {100 * plan['padding_waste']:.2f} %, "
            f"samples {plan['samples_per_sequence']['mean']:.1f}, "
            f"images {images['mean']:.1f} +- {images['sd']:.1f}, distinct {distinct['mean']:.1f}"
        )
    return "\n".join(lines)
