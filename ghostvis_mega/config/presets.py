"""Model presets: plain dictionaries that `load.py` merges under the keys a run gives itself.

Sizes are those of the released models: Qwen2.5 (Hugging Face `Qwen/Qwen2.5-*`), SigLIP
(`google/siglip-*`) and CLIP (`openai/clip-vit-large-patch14-336`).
"""

from typing import Any

Settings = dict[str, Any]

SMALL_DEPTH = 20
"""Layers of `qwen25_small`; its width follows as 64 a layer."""

_QWEN25: Settings = {
    "head_dim": 128,
    "rope_base": 1_000_000.0,
    "norm_eps": 1e-6,
    "activation": "swiglu",
    "qkv_bias": True,
}

_QWEN25_SMALL: Settings = {
    **_QWEN25,
    "num_layers": SMALL_DEPTH,
    "hidden_size": 64 * SMALL_DEPTH,
    "num_heads": 10,
    "num_kv_heads": 5,
    "ffn_hidden_size": 3456,
    "vocab_size": 151_936,
    "max_positions": 2_048,
    "tied_embeddings": True,
}

_QWEN25_1_5B: Settings = {
    **_QWEN25,
    "num_layers": 28,
    "hidden_size": 1536,
    "num_heads": 12,
    "num_kv_heads": 2,
    "ffn_hidden_size": 8960,
    "vocab_size": 151_936,
    "max_positions": 32_768,
    "tied_embeddings": True,
}

_QWEN25_7B: Settings = {
    **_QWEN25,
    "num_layers": 28,
    "hidden_size": 3584,
    "num_heads": 28,
    "num_kv_heads": 4,
    "ffn_hidden_size": 18_944,
    "vocab_size": 152_064,
    "max_positions": 32_768,
    "tied_embeddings": False,
}

_NANOCHAT_ORIGINAL: Settings = {
    "num_layers": 20,
    "hidden_size": 1280,
    "num_heads": 10,
    "num_kv_heads": 10,
    "head_dim": 128,
    "ffn_hidden_size": 5120,
    "vocab_size": 65_536,
    "max_positions": 2_048,
    "rope_base": 10_000.0,
    "norm_eps": 1e-6,
    "activation": "relu2",
    "qkv_bias": False,
    "tied_embeddings": False,
}

_TINY_LLM: Settings = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "ffn_hidden_size": 384,
    "vocab_size": 512,
    "max_positions": 512,
    # Trained from scratch on short sequences: the classic base, not Qwen2.5's.
    "rope_base": 10_000.0,
    "tied_embeddings": True,
    # Narrow layers want larger initial weights than the usual 0.02 to learn shapes at all.
    "init_std": 0.05,
}
_TINY_TOWER: Settings = {
    "kind": "siglip",
    "num_layers": 2,
    "hidden_size": 128,
    "num_heads": 4,
    "ffn_hidden_size": 384,
    "image_size": 64,
    "patch_size": 8,
    "init_std": 0.07,
}

TOWER_PRESETS: dict[str, Settings] = {
    "siglip_so400m_14": {
        "kind": "siglip",
        "num_layers": 27,
        "hidden_size": 1152,
        "num_heads": 16,
        "ffn_hidden_size": 4304,
        "image_size": 336,
        "patch_size": 14,
        "feature_layer": -1,
    },
    "siglip_l_16": {
        "kind": "siglip",
        "num_layers": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "ffn_hidden_size": 4096,
        "image_size": 336,
        "patch_size": 16,
        "feature_layer": -1,
    },
    # 336 is no multiple of 32; 256 gives the 8 x 8 grid of the released siglip2-base-patch32-256.
    "siglip_b_32": {
        "kind": "siglip",
        "num_layers": 12,
        "hidden_size": 768,
        "num_heads": 12,
        "ffn_hidden_size": 3072,
        "image_size": 256,
        "patch_size": 32,
        "feature_layer": -1,
    },
    "clip_l_14_336": {
        "kind": "clip",
        "num_layers": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "ffn_hidden_size": 4096,
        "image_size": 336,
        "patch_size": 14,
        "feature_layer": -2,
    },
}
"""Vision towers, for `model.vision.preset`."""

_CONNECTOR: Settings = {
    "kind": "perceiver_mlp",
    "tokens_per_image": 64,
    "num_layers": 2,
    "num_heads": 8,
}

_VISION_PARTS: Settings = {
    "vision": TOWER_PRESETS["siglip_so400m_14"],
    "connector": _CONNECTOR,
}

MODEL_PRESETS: dict[str, Settings] = {
    "vlm_tiny": {
        "llm": _TINY_LLM,
        "vision": _TINY_TOWER,
        "connector": {"kind": "avgpool_mlp", "tokens_per_image": 16, "init_std": 0.08},
    },
    "qwen25_small": {"llm": _QWEN25_SMALL},
    "qwen25_1_5b": {"llm": _QWEN25_1_5B},
    "qwen25_7b": {"llm": _QWEN25_7B},
    "vlm_small": {"llm": _QWEN25_SMALL, **_VISION_PARTS},
    "vlm_1_5b": {"llm": _QWEN25_1_5B, **_VISION_PARTS},
    "vlm_7b": {"llm": _QWEN25_7B, **_VISION_PARTS},
    "nanochat_original": {"llm": _NANOCHAT_ORIGINAL},
}
"""Whole models, for `model.preset`."""
