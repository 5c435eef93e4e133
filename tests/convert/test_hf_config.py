"""Settings that files leave out are what transformers takes for them."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig

from ghostvis_mega.config.schema import LLMConfig
from ghostvis_mega.convert.hf_config import model_of_parts, parts_from_config
from ghostvis_mega.utils.errors import CheckpointError

HUB = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
    "vocab_size": 32_064,
}
"""As llava-1.5-7b-hf has it."""
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32_000,
}


def llava(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": TOWER,
    }


def told(llm: LLMConfig) -> tuple[Any, ...]:
    return (
        *(llm.num_layers, llm.hidden_size, llm.num_heads, llm.num_kv_heads, llm.head_dim),
        *(llm.ffn_hidden_size, llm.vocab_size, llm.max_positions, llm.norm_eps, llm.rope_base),
        llm.tied_embeddings,
    )


@pytest.mark.parametrize(
    "text",
    [
        HUB,
        {"model_type": "llama"},
        {"model_type": "qwen2"},
        {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8},
        {"model_type": "qwen2", "num_attention_heads": 64, "vocab_size": 99},
    ],
    ids=str,
)
def test_sparse_settings_are_those_of_transformers(text: dict[str, Any]):
    config = llava(text)
    found = parts_from_config(config, Path("model"))
    theirs = LlavaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    own, tower = theirs.text_config, theirs.vision_config
    assert found.llm is not None and found.vision is not None
    heads = own.num_attention_heads
    assert told(found.llm) == (
        *(own.num_hidden_layers, own.hidden_size, heads, own.num_key_value_heads),
        getattr(own, "head_dim", own.hidden_size // heads),
        *(own.intermediate_size, own.vocab_size, own.max_position_embeddings, own.rms_norm_eps),
        *(own.rope_parameters["rope_theta"], own.tie_word_embeddings),
    )
    assert found.llm.qkv_bias == (text["model_type"] == "qwen2")
    assert (found.vision.num_layers, found.vision.hidden_size, found.vision.image_size) == (
        *(tower.num_hidden_layers, tower.hidden_size, tower.image_size),
    )


def test_a_size_that_cannot_be_names_no_file_that_may_not_exist():
    with pytest.raises(CheckpointError, match="model.gguf gives num_kv_heads as -1"):
        parts_from_config({"model_type": "llama", "num_key_value_heads": -1}, Path("model.gguf"))
    with pytest.raises(CheckpointError, match="model/config.json gives num_kv_heads as -1"):
        parts_from_config({"model_type": "llama", "num_key_value_heads": -1}, Path("model"))
    with pytest.raises(CheckpointError, match="num_attention_heads is 0"):
        parts_from_config({"model_type": "llama", "num_attention_heads": 0}, Path("model"))


WRONG: list[Any] = [
    *(None, True, 0, -1, 3, 1.5, 10**30, float("nan"), float("inf")),
    *("", "abc", [], [1], [None], {}, {"a": 1}, {"model_type": 3}, {"rope_type": []}),
]
KINDS: dict[str, dict[str, Any]] = {
    "llava": llava(HUB),
    "text": HUB | {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16},
    "tower": TOWER,
    "both": {"model_type": "siglip", "vision_config": TOWER | {"model_type": "siglip"}},
    "ghostvis": llava(HUB)
    | {
        "model_type": "ghostvis_vl",
        "connector": {"kind": "perceiver_mlp", "tokens_per_image": 4},
        "vision_post_norm": False,
    },
}
OPTIONAL = ("rope_parameters", "rope_scaling", "tie_word_embeddings", "hidden_act", "num_channels")


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_stands_in_a_field_is_refused_in_a_sentence(kind: str):
    """A list where a mapping belongs, a text where a number does, and so on through all fields."""
    right, refused = KINDS[kind], 0
    places = [(right, {})]
    for name in ("text_config", "vision_config"):
        if name in right:
            places.append((right[name], {name: None}))
    for section, inside in places:
        for key in (*section, *OPTIONAL):
            for value in WRONG:
                changed = section | {key: value}
                config = right | dict.fromkeys(inside, changed) if inside else changed
                try:
                    model_of_parts(parts_from_config(config, Path("model")))
                except CheckpointError as error:
                    refused += 1
                    assert 5 < len(str(error)) < 600
    assert refused > 50
    model_of_parts(parts_from_config(right, Path("model")))


def test_sections_that_are_none_are_named():
    for config, told in (
        (llava(HUB) | {"vision_config": None}, "vision_config is None; it must be a mapping"),
        (llava(HUB) | {"vision_config": []}, "vision_config is []; it must be a mapping"),
        (llava(HUB) | {"text_config": "abc"}, "text_config is 'abc'; it must be a mapping"),
        (HUB | {"rope_parameters": [1]}, "rope_parameters is [1]; it must be a mapping"),
        (HUB | {"rope_scaling": 3}, "rope_scaling is 3; it must be a mapping"),
        (KINDS["both"] | {"vision_config": 3}, "vision_config is 3; it must be a mapping"),
        (KINDS["ghostvis"] | {"vision_post_norm": "often"}, "gives post_norm as 'often'"),
        (
            HUB | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 4},
            "num_kv_heads=4 does not divide model.llm.num_heads=6",
        ),
    ):
        with pytest.raises(CheckpointError) as error:
            model_of_parts(parts_from_config(config, Path("model")))
        assert told in str(error.value)
