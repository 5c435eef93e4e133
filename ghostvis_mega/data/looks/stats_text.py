"""Statistics of `data.stats` as lines for a terminal."""

from typing import Any


def _spread_text(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in spread.items()) or "none"


def stats_text(stats: dict[str, Any]) -> str:
    """A screen of text; statistics of a synthetic mix have no content to show."""
    lines = [stats["path"], *(_content(stats) if "counts" in stats else [])]
    lines += [
        f"  length    {_spread_text(stats['length'])} (an image is {stats['tokens_per_image']})",
        f"  too long  {stats['too_long']} for {stats['seq_length']} "
        f"({stats.get('too_long_policy', 'drop')})",
    ]
    if stats["segment_align"] > 1:
        lines.append(
            f"  aligned   samples to {stats['segment_align']} positions, which takes "
            f"{stats['alignment_padding']} positions of padding"
        )
    lines.append(f"  packing into {stats['seq_length']}:")
    for name, plan in stats["packing"].items():
        images, distinct = plan["images_per_sequence"], plan["distinct_images_per_sequence"]
        lines.append(
            f"    {name:14} {plan['sequences']} sequences (at least {plan['lower_bound']}), "
            f"padding waste {100 * plan['padding_waste']:.2f} %, "
            f"samples {plan['samples_per_sequence']['mean']:.1f}, "
            f"images {images['mean']:.1f} +- {images['sd']:.1f}, distinct {distinct['mean']:.1f}"
        )
    lines.append("  most loaded rank over mean rank (1 is perfect), tower and total cost:")
    for row in stats["balance"]:
        naive, assigned = row["naive"], row["assigned"]
        lines.append(
            f"    {row['data_parallel']:4} ranks   naive {naive['tower']:.3f} {naive['total']:.3f}"
            f"   assigned {assigned['tower']:.3f} {assigned['total']:.3f}"
            f"   ({row['steps']} steps of {row['global_size']} sequences)"
        )
    lines.append("  bars:")
    lines += [
        f"    {'ok' if bar['ok'] else 'MISSED':8}{bar['name']}: {bar['value']:.4f}, "
        f"at most {bar['limit']:g}"
        for bar in stats["bars"]
    ]
    return "\n".join(lines)


def _content(stats: dict[str, Any]) -> list[str]:
    counts = stats["counts"]
    formats = ", ".join(f"{count} {name}" for name, count in stats["image_formats"].items())
    kinds = ", ".join(f"{name} {count}" for name, count in stats["tokens"].items())
    lines = [
        f"  samples   {counts['samples']} ({stats['text_only_samples']} text only, "
        f"{stats['several_images_samples']} with several images), {counts['rejected']} rejected",
        f"  images    {counts['images']} ({formats or 'none'}), "
        f"{stats['samples_per_image']:g} samples an image",
        f"  width     {_spread_text(stats['image_width'])}",
        f"  height    {_spread_text(stats['image_height'])}",
        f"  tokens    {counts['tokens']} stored, vocabulary {stats['vocab_size']}, "
        f"{100 * stats['trained_share']:.1f} % of positions trained",
        f"  positions {kinds}",
    ]
    lines += [
        f"  source    {source['name']}: {source['samples']} samples, {source['rejected']} rejected"
        for source in stats["sources"]
    ]
    lines += [f"  rejected  {count} {reason}" for reason, count in stats["rejects"].items()]
    return lines
