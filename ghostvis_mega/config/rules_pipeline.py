"""How many of the LLM's layers each pipeline stage has: the one arithmetic for rules and plan."""

from collections.abc import Iterator

from ghostvis_mega.config.rules_model import choices, divisors
from ghostvis_mega.config.schema import ParallelConfig, RunConfig


def stage_layers(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...] | None:
    """Layers of every pipeline stage, as Megatron-Core deals them out; None where they cannot be.

    Args:
        parallel: The first and the last stage may have a number of their own; the other stages have
            equally many, and a stage shares its own out evenly over its chunks.
        num_layers: Of the LLM.
    """
    p = parallel
    ends = [n for n in (p.first_stage_layers, p.last_stage_layers) if n is not None]
    others, left = p.pipeline - len(ends), num_layers - sum(ends)
    if others < 0 or left < others or (left % others if others else left):
        return None
    each = [left // others] * others if others else []
    first = [] if p.first_stage_layers is None else [p.first_stage_layers]
    last = [] if p.last_stage_layers is None else [p.last_stage_layers]
    sizes = (*first, *each, *last)
    return None if any(size % p.virtual_pipeline for size in sizes) else sizes


def pipeline_problems(cfg: RunConfig) -> Iterator[str]:
    """Whether the layers can be dealt out over stages and chunks."""
    p, layers = cfg.parallel, cfg.model.llm.num_layers
    given = {
        name: size
        for name in ("first_stage_layers", "last_stage_layers")
        if (size := getattr(p, name)) is not None
    }
    if not given:
        yield from _even_problems(p, layers)
        return
    named = " and ".join(f"parallel.{name}={size}" for name, size in given.items())
    if p.pipeline == 1:
        verb = "set a stage" if len(given) > 1 else "sets a stage"
        yield f"{named} {verb} apart, but parallel.pipeline=1 has one stage only. Leave it out."
        return
    if stage_layers(p, layers) is not None:
        return
    others, left = p.pipeline - len(given), layers - sum(given.values())
    if others == 0:
        yield (
            f"{named} make {layers - left} layers, but model.llm.num_layers={layers}. Leave one of "
            "the two out: it follows from the other."
        )
    elif left < others or left % others:
        yield (
            f"{named} leave{'s' if len(given) == 1 else ''} {max(left, 0)} of "
            f"model.llm.num_layers={layers} for the other {others} of {p.pipeline} stages, which "
            f"need equally many. Leave a multiple of {others}."
        )
    else:
        sizes = [*given.values(), left // others]
        odd = [size for size in dict.fromkeys(sizes) if size % p.virtual_pipeline]
        yield (
            f"{named}: stages of {choices(odd)} layers cannot be cut into "
            f"parallel.virtual_pipeline={p.virtual_pipeline} equal chunks. Give every stage a "
            f"multiple of {p.virtual_pipeline} layers."
        )


def _even_problems(p: ParallelConfig, layers: int) -> Iterator[str]:
    if stage_layers(p, layers) is not None:
        return
    product = f"parallel.pipeline={p.pipeline}"
    if p.virtual_pipeline > 1:
        product += f" x parallel.virtual_pipeline={p.virtual_pipeline}"
    advice = ""
    if p.pipeline > 1 and p.virtual_pipeline == 1:
        advice = ", or parallel.first_stage_layers and parallel.last_stage_layers"
    yield (
        f"{product} does not divide model.llm.num_layers={layers}: every stage needs as many "
        f"layers. Use a product of {choices(divisors(layers))}{advice}."
    )
