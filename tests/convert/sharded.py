"""The model that all layouts hold, as settings of ours and as one of transformers'."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.convert.remote.configuration_ghostvis import GhostVisConfig
from ghostvis_mega.convert.remote.modeling_ghostvis import GhostVisForConditionalGeneration
from ghostvis_mega.perf.certify.problem import MODEL
from tests.convert.cases import (
    ATTENTION,
    IMAGE,
    PERCEIVER,
    TEXT,
    TIED,
    TOWER,
    llava_config,
    randomise,
    save,
)

VOCAB, PADDED = 157, 320
"""So much padding that the second of two tensor-parallel ranks has nothing else."""
SIDE = 16
NEW_TOKENS = 5
_LLM = MODEL["llm"] | {
    "vocab_size": PADDED,
    "vocab_padding": PADDED - VOCAB,
    "max_positions": 128,
    "norm_eps": 1e-6,
}
_MODEL = {
    "llm": _LLM,
    "vision": MODEL["vision"] | {"num_layers": 2},
    "connector": {"kind": "mlp", "tokens_per_image": None},
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": _MODEL | {"llm": _LLM | {"tied_embeddings": False}},
    "tied": _MODEL | {"llm": _LLM | {"tied_embeddings": True}},
}
PROMPTS: list[tuple[list[int], tuple[int, ...]]] = [
    ([7, 30, 41, 9, 100, 64], ()),
    ([7, IMAGE, 30, 41], (0,)),
    ([IMAGE, 8, IMAGE, 19, 23, IMAGE, 77], (2, 1, 2)),
]
"""Token ids with one sentinel a picture, and the pictures."""


def pictures() -> torch.Tensor:
    """uint8 [3, 3, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def stock(kind: str) -> LlavaForConditionalGeneration:
    """transformers' model of the same sizes, with random weights."""
    llm, vision = MODELS[kind]["llm"], MODELS[kind]["vision"]
    text = TEXT | {
        "num_hidden_layers": llm["num_layers"],
        "hidden_size": llm["hidden_size"],
        "num_attention_heads": llm["num_heads"],
        "num_key_value_heads": llm["num_kv_heads"],
        "intermediate_size": llm["ffn_hidden_size"],
        "vocab_size": VOCAB,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm["rope_base"]},
        "tie_word_embeddings": kind == "tied",
    }
    tower = TOWER | {
        "num_hidden_layers": vision["num_layers"],
        "hidden_size": vision["hidden_size"],
        "num_attention_heads": vision["num_heads"],
        "intermediate_size": vision["ffn_hidden_size"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
    }
    config = LlavaConfig(
        text_config=Qwen2Config(**text),
        vision_config=SiglipVisionConfig(**tower, vision_use_head=False),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=kind == "tied",
        **ATTENTION,
    )
    return randomise(LlavaForConditionalGeneration(config))


FORMS = {"text": "text", "llava-clip": "llava", "perceiver-siglip": "ghostvis"}
"""Other models, by the form of their export: Qwen2 with the heads of the 1.5B, 12 on 2 and tied;
CLIP as tower; a resampler."""


def prepare_form(kind: str, folder: Path) -> Path:
    """A model of `FORMS` with four layers, as a directory of transformers, and beside it the
    imported checkpoint."""
    if kind == "text":
        model = Qwen2ForCausalLM(Qwen2Config(**TIED | {"num_hidden_layers": 4}, **ATTENTION))
    elif kind == "llava-clip":
        text = TEXT | {"num_hidden_layers": 4}
        model = LlavaForConditionalGeneration(llava_config("clip", text))
    else:
        text = TEXT | {"num_hidden_layers": 4}
        config = llava_config("siglip", text, GhostVisConfig, connector=PERCEIVER)
        model = GhostVisForConditionalGeneration(config)
    source = save(randomise(model), folder / f"{kind}-hf")
    import_hf([source], folder / f"{kind}-native", ImportOptions(vocab_multiple=PADDED))
    return source


def prepare(kind: str, folder: Path) -> tuple[LlavaForConditionalGeneration, Path]:
    """The stock model, its directory, and beside it the imported checkpoint."""
    model = stock(kind)
    source = save(model, folder / f"{kind}-hf")
    import_hf([source], folder / f"{kind}-native", ImportOptions(vocab_multiple=PADDED))
    return model, source
