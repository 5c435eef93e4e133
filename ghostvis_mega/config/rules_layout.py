"""Rules of context parallelism: what can be cut evenly over its ranks."""

from collections.abc import Iterator
from math import lcm

from ghostvis_mega.config.schema import RunConfig


def context_problems(cfg: RunConfig) -> Iterator[str]:
    """Broken rules of `parallel.context` and `data.segment_align`, one sentence each."""
    data, context = cfg.data, cfg.parallel.context
    align = data.segment_align
    if align is not None and not data.packing:
        yield (
            f"data.segment_align={align} pads the samples of a pack, but data.packing=false. "
            "Remove it."
        )
        return
    if align is not None and context > 1 and align % (2 * context):
        yield (
            f"data.segment_align={align} is no multiple of {2 * context}: parallel.context="
            f"{context} cuts every sample into two chunks a rank. Use {2 * context}, or leave it "
            "out."
        )
        return
    multiple, why = _length_multiple(cfg)
    if data.seq_length % multiple:
        near = -(-data.seq_length // multiple) * multiple
        yield (
            f"data.seq_length={data.seq_length} is no multiple of {multiple}: {why}. Use {near}."
        )


def _length_multiple(cfg: RunConfig) -> tuple[int, str]:
    """What a sequence's length must be a multiple of, and why."""
    p = cfg.parallel
    split = p.tensor if p.sequence_parallel else 1
    if p.context == 1:
        return cfg.segment_align, "data.segment_align pads the end of a pack like its samples"
    why = f"parallel.context={p.context} cuts it into two chunks a rank"
    if split > 1:
        why += (
            f", and parallel.sequence_parallel cuts each rank's part over parallel.tensor={split}"
        )
    return lcm(2 * p.context, p.context * split, cfg.segment_align), why
