"""Rules between the sizes of a model: each function yields one sentence a problem."""

from collections.abc import Iterator
from math import isqrt

from ghostvis_mega.config.schema import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig

TEXT_ROOM = 16
"""Positions that a question, its answer and the chat template need beside an image."""


def divisors(*numbers: int) -> list[int]:
    """Common divisors, ascending."""
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]


def choices(values: list[int]) -> str:
    """`1, 2 or 6`."""
    head = ", ".join(map(str, values[:-1]))
    return f"{head} or {values[-1]}" if head else str(values[-1])


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Everything about the model alone."""
    vision, connector = model.vision, model.connector
    yield from part_problems(model.llm, vision, connector)
    if vision is not None and connector is None:
        yield (
            "model.vision is given without model.connector, so no image could reach the LLM. "
            "Add model.connector (kind: mlp, avgpool_mlp or perceiver_mlp) or remove model.vision."
        )
    if connector is not None and vision is None:
        yield (
            "model.connector is given without model.vision, so it would have no input. "
            "Add model.vision (preset: siglip_so400m_14, ...) or remove model.connector."
        )


def part_problems(
    llm: LLMConfig | None, vision: VisionConfig | None, connector: ConnectorConfig | None
) -> Iterator[str]:
    """Everything about the parts that are there, which need not be a whole model."""
    if llm is not None:
        yield from _llm_problems(llm)
    if vision is not None:
        yield from _vision_problems(vision)
    if vision is not None and connector is not None:
        yield from _connector_problems(connector, vision)


def vision_notes(vision: VisionConfig | None) -> Iterator[str]:
    """What is allowed and may surprise."""
    if vision is None or vision.image_size % vision.patch_size == 0:
        return
    size, seen = vision.image_size, vision.grid * vision.patch_size
    yield (
        f"model.vision.image_size={size} is no multiple of model.vision.patch_size="
        f"{vision.patch_size}: the last {size - seen} pixels to the right and below of each "
        f"picture are not seen, as in transformers. {seen} has the same patches and none left."
    )


def _llm_problems(llm: LLMConfig) -> Iterator[str]:
    if llm.num_heads % llm.num_kv_heads:
        yield (
            f"model.llm.num_kv_heads={llm.num_kv_heads} does not divide "
            f"model.llm.num_heads={llm.num_heads}. Use {choices(divisors(llm.num_heads))}."
        )
    if llm.vocab_padding >= llm.vocab_size:
        yield (
            f"model.llm.vocab_padding={llm.vocab_padding} leaves no token of "
            f"model.llm.vocab_size={llm.vocab_size}, which counts the padding as well. Use less."
        )
    if llm.head_dim % 2:
        yield (
            f"model.llm.head_dim={llm.head_dim} is odd, but rotary positions turn pairs. "
            f"Use {llm.head_dim + 1}."
        )


def _vision_problems(vision: VisionConfig) -> Iterator[str]:
    size, patch = vision.image_size, vision.patch_size
    # A remainder is fine: the published SigLIP of 384 pixels has patches of 14.
    if size < patch:
        yield (
            f"model.vision.image_size={size} is smaller than model.vision.patch_size={patch}, so "
            f"a picture has no patch. Use at least {patch}."
        )
    if vision.hidden_size % vision.num_heads:
        yield (
            f"model.vision.num_heads={vision.num_heads} does not divide "
            f"model.vision.hidden_size={vision.hidden_size}. "
            f"Use one of {choices(divisors(vision.hidden_size)[:12])}."
        )
    if not -vision.num_layers <= vision.feature_layer <= -1:
        yield (
            f"model.vision.feature_layer={vision.feature_layer} is out of range: it counts the "
            f"{vision.num_layers} layers from the end. Use -1 (last) to {-vision.num_layers}."
        )
    elif vision.post_norm and vision.feature_layer != -1:
        yield (
            f"model.vision.post_norm=true belongs to the last layer, but "
            f"model.vision.feature_layer={vision.feature_layer}. Set post_norm: false, or "
            "feature_layer: -1."
        )


def _connector_problems(connector: ConnectorConfig, vision: VisionConfig) -> Iterator[str]:
    kind, tokens = connector.kind, connector.tokens_per_image
    field = f"model.connector.tokens_per_image={tokens}"
    if kind == "mlp":
        if tokens is not None and tokens != vision.num_patches:
            yield (
                f"{field} cannot be had with model.connector.kind=mlp, which gives one embedding "
                f"a patch ({vision.num_patches}). Set it to null, or use avgpool_mlp or "
                "perceiver_mlp."
            )
        return
    if tokens is None:
        yield (
            f"model.connector.tokens_per_image is missing, which model.connector.kind={kind} "
            "needs. Set it (64 is usual), or use kind mlp."
        )
        return
    if kind == "avgpool_mlp" and vision.grid:
        yield from _pooling_problems(field, tokens, vision.grid)
    if kind == "perceiver_mlp" and vision.hidden_size % connector.num_heads:
        yield (
            f"model.connector.num_heads={connector.num_heads} does not divide "
            f"model.vision.hidden_size={vision.hidden_size}, the resampler's width. "
            f"Use one of {choices(divisors(vision.hidden_size)[:12])}."
        )


def _pooling_problems(field: str, tokens: int, grid: int) -> Iterator[str]:
    fitting = choices([side**2 for side in divisors(grid)])
    side = isqrt(tokens)
    if side**2 != tokens:
        yield f"{field} is no square, but pooling keeps the image square. Use {fitting}."
    elif grid % side:
        yield (
            f"{field} cannot be pooled from a grid of {grid} x {grid} patches: {side} does not "
            f"divide {grid}. Use {fitting}."
        )


def data_fit_problems(model: ModelConfig, seq_length: int) -> Iterator[str]:
    """Whether sequences fit the model and images fit the sequences."""
    if seq_length > model.llm.max_positions:
        yield (
            f"data.seq_length={seq_length} exceeds model.llm.max_positions="
            f"{model.llm.max_positions}. Use at most that, or raise max_positions if the model is "
            "meant to learn longer ones."
        )
    tokens = model.tokens_per_image
    if tokens and tokens + TEXT_ROOM > seq_length:
        yield (
            f"data.seq_length={seq_length} has no room for an image of {tokens} embeddings "
            f"(model.connector.tokens_per_image) and its text. Use at least {tokens + TEXT_ROOM}, "
            "or fewer tokens_per_image."
        )
