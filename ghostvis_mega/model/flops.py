"""Floating-point operations of one batch, from sizes alone: LLM and vision side apart.

Counted are matrix products, `2 * m * n * k` each: linear layers, the patch convolution, the two
products of attention (scores, and weights times values), and the head on the rows it runs on.
Norms, activations, rotary angles, softmax and the embedding look-up are not counted, as usual.

Causal attention of a segment of s tokens can be counted in two ways:

- `causal`: half of s * s scores, the useful half. Megatron-LM's convention; take it for MFU.
- `full`: all s * s scores, what the unfused products compute and `FlopCounterMode` reports.

The backward is twice the forward, less what frozen parts save: no weight gradient for a frozen
matrix, no input gradient where nothing before it is trained. What fused attention recomputes in
its backward is not counted. Recomputed forwards (tower, activation checkpointing) do no useful
work either and are reported apart, so that MFU leaves them out and hardware use can add them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from ghostvis_mega.config.schema import LLMConfig, ModelConfig, Module, VisionConfig

Attention = Literal["causal", "full"]


@dataclass(frozen=True)
class PartFlops:
    """Operations of one part of the model for one batch."""

    forward: int = 0
    backward: int = 0
    recompute: int = 0
    """Forwards that are run a second time; not part of `total`."""

    @property
    def total(self) -> int:
        """Operations that train the model, each counted once."""
        return self.forward + self.backward

    def __add__(self, other: "PartFlops") -> "PartFlops":
        return PartFlops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
        )


@dataclass(frozen=True)
class BatchFlops:
    """Operations of one batch."""

    llm: PartFlops
    vision: PartFlops
    """Tower, resampler and projector."""

    @property
    def total(self) -> int:
        """Operations that train the model: the numerator of MFU."""
        return self.llm.total + self.vision.total


def batch_flops(
    model: ModelConfig,
    *,
    segments: Sequence[int],
    head_rows: int,
    num_images: int,
    trained: Collection[Module],
    attention: Attention = "causal",
    tower_recompute: bool = True,
    llm_recompute: Literal["none", "selective", "full"] = "none",
) -> BatchFlops:
    """Operations of one optimizer step over a batch.

    Args:
        model: The model.
        segments: Length in tokens of each stretch that attends within itself: each packed sample,
            or each row without packing. Padding that is computed counts as segments of its own.
        head_rows: Positions that go through the output matrix (the trained ones).
        num_images: Images that are encoded.
        trained: Modules that are not frozen; empty for a forward alone.
        attention: Convention for causal attention.
        tower_recompute: Whether the vision side runs its forward again for its backward.
        llm_recompute: Activation checkpointing of the LLM (`train.recompute`).
    """
    vision = PartFlops()
    vision_trained = num_images > 0 and any(name in trained for name in model.modules[1:])
    if num_images:
        vision = _vision_flops(model, num_images, trained)
        if tower_recompute and vision_trained:
            vision += PartFlops(recompute=vision.forward)
    llm = _llm_flops(
        model.llm,
        segments=segments,
        head_rows=head_rows,
        share=2 if attention == "causal" else 1,
        trained="llm" in trained,
        # Gradients pass through a frozen LLM to the image embeddings.
        upstream=vision_trained,
        recompute=llm_recompute,
    )
    return BatchFlops(llm=llm, vision=vision)


def _linear(
    rows: int, width_in: int, width_out: int, *, trained: bool, input_grad: bool
) -> PartFlops:
    """A linear layer; `input_grad` says whether anything before it is trained."""
    forward = 2 * rows * width_in * width_out
    return PartFlops(forward, forward * (int(trained) + int(input_grad)))


def _attention(
    scores: int, width: int, *, query_grad: bool, memory_grad: bool, share: int = 1
) -> PartFlops:
    """Scores and weighted values of `scores` query-key pairs over heads of `width` in all.

    Each of the two forward products has two gradients. Three of the four lead to keys, queries or
    the weights and are needed for either side; without a query gradient its own product is saved.
    """
    product = 2 * scores * width // share
    backward = (3 + int(query_grad)) * product if memory_grad else 0
    return PartFlops(2 * product, backward)


def _llm_flops(
    llm: LLMConfig,
    *,
    segments: Sequence[int],
    head_rows: int,
    share: int,
    trained: bool,
    upstream: bool,
    recompute: str,
) -> PartFlops:
    rows = sum(segments)
    h, f, v = llm.hidden_size, llm.ffn_hidden_size, llm.vocab_size
    q, kv = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    # The embedding before the first layer is trained with the LLM, so every input gradient is due.
    grads = {"trained": trained, "input_grad": trained or upstream}
    gated = 2 if llm.activation == "swiglu" else 1
    core = _attention(
        sum(s * s for s in segments),
        q,
        query_grad=grads["input_grad"],
        memory_grad=grads["input_grad"],
        share=share,
    )
    mlp = _linear(rows, h, gated * f, **grads) + _linear(rows, f, h, **grads)
    layer = _linear(rows, h, q + 2 * kv, **grads) + core + _linear(rows, q, h, **grads) + mlp
    head = _linear(head_rows, h, v, **grads)
    again = {"none": 0, "selective": mlp.forward, "full": layer.forward}[recompute]
    again = llm.num_layers * again if grads["input_grad"] else 0
    return PartFlops(
        llm.num_layers * layer.forward + head.forward,
        llm.num_layers * layer.backward + head.backward,
        again,
    )


def _vision_flops(model: ModelConfig, num_images: int, trained: Collection[Module]) -> PartFlops:
    vision, connector = model.vision, model.connector
    assert vision is not None and connector is not None, "a text-only model encodes no images"
    flops = _tower_flops(vision, num_images, trained="vision" in trained)
    resampler_before = "vision" in trained
    projector_before = resampler_before
    if connector.kind == "perceiver_mlp":
        projector_before = resampler_before or "resampler" in trained
        for layer in range(connector.num_layers):
            flops += _perceiver_layer(
                vision.hidden_size,
                num_images=num_images,
                latents=model.tokens_per_image,
                patches=vision.num_patches,
                trained="resampler" in trained,
                tower_trained=resampler_before,
                first=layer == 0,
            )
    rows = num_images * model.tokens_per_image
    c, h = vision.hidden_size, model.llm.hidden_size
    own = "projector" in trained
    flops += _linear(rows, c, h, trained=own, input_grad=projector_before)
    flops += _linear(rows, h, h, trained=own, input_grad=own or projector_before)
    return flops


def _tower_flops(vision: VisionConfig, num_images: int, *, trained: bool) -> PartFlops:
    c, f = vision.hidden_size, vision.ffn_hidden_size
    tokens = vision.num_patches + (1 if vision.kind == "clip" else 0)
    rows = num_images * tokens
    grads = {"trained": trained, "input_grad": trained}
    layer = (
        _linear(rows, c, 3 * c, **grads)
        + _attention(num_images * tokens**2, c, query_grad=trained, memory_grad=trained)
        + _linear(rows, c, c, **grads)
        + _linear(rows, c, f, **grads)
        + _linear(rows, f, c, **grads)
    )
    # Pixels need no gradient.
    patches = _linear(
        num_images * vision.num_patches,
        3 * vision.patch_size**2,
        c,
        trained=trained,
        input_grad=False,
    )
    # Layers after the one that feeds the connector are not run.
    used = vision.num_layers + 1 + vision.feature_layer
    return PartFlops(
        patches.forward + used * layer.forward, patches.backward + used * layer.backward
    )


def _perceiver_layer(
    c: int,
    *,
    num_images: int,
    latents: int,
    patches: int,
    trained: bool,
    tower_trained: bool,
    first: bool,
) -> PartFlops:
    """One resampler layer: latents attend to patches and latents, then comes an MLP."""
    rows, memory = num_images * latents, num_images * (patches + latents)
    reached = trained or tower_trained
    # The first layer's latents are parameters of the resampler and depend on no patch.
    latents_reached = trained or (tower_trained and not first)
    return (
        _linear(rows, c, c, trained=trained, input_grad=latents_reached)
        + _linear(memory, c, 2 * c, trained=trained, input_grad=reached)
        + _attention(
            num_images * latents * (patches + latents),
            c,
            query_grad=latents_reached,
            memory_grad=reached,
        )
        + _linear(rows, c, c, trained=trained, input_grad=reached)
        + _linear(rows, c, 4 * c, trained=trained, input_grad=reached)
        + _linear(rows, 4 * c, c, trained=trained, input_grad=reached)
    )
