"""Parameters of a model by module, from its settings alone."""

from ghostvis_mega.config.schema import LLMConfig, ModelConfig, Module, RunConfig, VisionConfig


def llm_parameters(llm: LLMConfig) -> int:
    """Parameters of the LLM, a tied head counted once."""
    h, q, kv = llm.hidden_size, llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    attention = h * (q + 2 * kv) + q * h + (q + 2 * kv if llm.qkv_bias else 0)
    matrices = 3 if llm.activation == "swiglu" else 2
    layer = attention + matrices * h * llm.ffn_hidden_size + 2 * h
    tables = 1 if llm.tied_embeddings else 2
    return llm.num_layers * layer + h + tables * llm.vocab_size * h


def tower_parameters(vision: VisionConfig) -> int:
    """Parameters of the tower as transformers builds it, without SigLIP's pooling head."""
    c, f = vision.hidden_size, vision.ffn_hidden_size
    layer = 4 * (c * c + c) + (c * f + f) + (f * c + c) + 4 * c
    patches = 3 * vision.patch_size**2 * c
    if vision.kind == "siglip":
        embeddings = patches + c + vision.num_patches * c
    else:  # class token and a norm before the layers, no bias in the patch embedding
        embeddings = patches + c + (vision.num_patches + 1) * c + 2 * c
    return embeddings + vision.num_layers * layer + 2 * c


def parameter_counts(model: ModelConfig) -> dict[Module, int]:
    """Parameters of each module that the model has, in the order of `ModelConfig.modules`."""
    counts: dict[Module, int] = {"llm": llm_parameters(model.llm)}
    vision, connector = model.vision, model.connector
    if vision is None or connector is None:
        return counts
    c, h = vision.hidden_size, model.llm.hidden_size
    counts["vision"] = tower_parameters(vision)
    if connector.kind == "perceiver_mlp":
        # Three norms, Q, K and V, output, and an MLP four times as wide.
        layer = 6 * c + (c * c + c) + 2 * (c * c + c) + (c * c + c) + (8 * c * c + 5 * c)
        counts["resampler"] = model.tokens_per_image * c + connector.num_layers * layer + 2 * c
    counts["projector"] = (c * h + h) + (h * h + h)
    return counts


def checkpoint_bytes(run: RunConfig) -> int:
    """About what one checkpoint takes on the disk: weights, and of what is trained two moments and
    fp32 masters beside BF16 weights. Headers and generators are some KB a rank."""
    counts = parameter_counts(run.model)
    in_bf16 = run.train.precision == "bf16"
    trained = sum(counts[name] for name in run.trained_modules)
    return sum(counts.values()) * (2 if in_bf16 else 4) + trained * (12 if in_bf16 else 8)
