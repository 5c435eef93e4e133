"""The modules that DeepSpeed owns, under names that mean the same on every rank.

Megatron-Core's schedule runs the raw model chunks. DeepSpeed is given a holder of the same layers
and is never
called: it keys its state by parameter name, and Megatron-Core numbers layers from zero on each
    pipeline stage.
"""

from torch import nn

from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.vision import VisionEncoder


class Holder(nn.Module):
    """A namespace of modules; it has no forward."""


def hold_llm(chunks: list[LLMChunk]) -> Holder:
    """All layers of this rank's chunks under global layer numbers."""
    holder = Holder()
    holder.decoder = Holder()
    holder.decoder.layers = nn.ModuleDict()
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            holder.decoder.layers[str(layer.layer_number - 1)] = layer
        for name in ("embedding", "head"):
            if hasattr(chunk, name):
                holder.add_module(name, getattr(chunk, name))
        if chunk.decoder.final_layernorm is not None:
            holder.decoder.final_layernorm = chunk.decoder.final_layernorm
    return holder


def hold_vision(encoder: VisionEncoder) -> Holder:
    """Tower, resampler and projector, without the encoder's pixel statistics (which stay fp32)."""
    holder = Holder()
    for name in ("tower", "resampler", "projector"):
        holder.add_module(name, getattr(encoder, name))
    return holder
