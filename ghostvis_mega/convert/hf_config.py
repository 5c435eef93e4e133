"""Settings of a model from and to Hugging Face's config.json."""

import reprlib
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from ghostvis_mega.config.rules_model import part_problems
from ghostvis_mega.config.schema import (
    TOWER_KINDS,
    ConnectorConfig,
    LLMConfig,
    ModelConfig,
    VisionConfig,
)
from ghostvis_mega.convert.mapping import Parts
from ghostvis_mega.utils.errors import CheckpointError

Format = Literal["llava", "ghostvis", "text", "tower"]
FORMATS: tuple[Format, ...] = get_args(Format)
GHOSTVIS_TYPE = "ghostvis_vl"
"""`model_type` of models that bring their code along."""

Config = dict[str, Any]
_TEXT_DEFAULTS: dict[str, Config] = {
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
    },
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
}
"""What transformers takes where config.json leaves a field out, as LLaVA's hub files do."""
_TEXT_TYPES = tuple(_TEXT_DEFAULTS)
_TOWER_TYPES = {
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "clip": "clip",
    "clip_vision_model": "clip",
}


class _Wrong(Exception):
    """A field of config.json that no model of ours has."""


def parts_from_config(config: Mapping[str, Any], path: Path) -> Parts:
    """The model that a config.json describes.

    Raises:
        CheckpointError: It is none that we can hold; names the field, its value and what is read.
    """
    try:
        return _parts(config)
    except _Wrong as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{_origin(path)} is broken or lacks {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{_origin(path)} gives {where} as {first['input']!r}, "
                              f"which cannot be: {first['msg']}") from error  # fmt: skip


def _origin(path: Path) -> Path:
    """The file that settings are from: of a directory its config.json, else the file itself."""
    return path if path.suffix == ".gguf" else path / "config.json"


def _parts(config: Mapping[str, Any]) -> Parts:
    kind = config.get("model_type")
    if kind in _TEXT_TYPES:
        return Parts(llm=_llm(config))
    if kind in _TOWER_TYPES:
        both = kind in ("siglip", "clip") and "vision_config" in config
        inner = _section(config, "vision_config") if both else config
        tower = _TOWER_TYPES[kind]
        return Parts(vision=_vision(inner, tower, layer=-2 if tower == "clip" else -1))
    if kind not in ("llava", GHOSTVIS_TYPE):
        known = ", ".join((*_TEXT_TYPES, *_TOWER_TYPES, "llava", GHOSTVIS_TYPE))
        raise _Wrong(f"model_type is {kind!r}; read are {known}")
    text, tower = dict(_section(config, "text_config")), _section(config, "vision_config")
    # LLaVA says it at the top as well, and old files there alone.
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    if config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    tower_kind = _TOWER_TYPES.get(tower.get("model_type", "clip_vision_model"))
    if tower_kind is None:
        raise _Wrong(f"vision_config.model_type is {tower['model_type']!r}; read are siglip, clip")
    _same(config, "projector_hidden_act", "gelu")
    _same(config, "multimodal_projector_bias", True)
    vision = _vision(tower, tower_kind, layer=config.get("vision_feature_layer", -2))
    if kind == "llava":
        whole = "default" if tower_kind == "clip" else "full"
        if config.get("vision_feature_select_strategy", "default") != whole:
            raise _Wrong(
                f"vision_feature_select_strategy is not {whole!r}, but all patches of {tower_kind} "
                "and no class token go to the language model here"
            )
        return Parts(llm=_llm(text), vision=vision, connector=ConnectorConfig(kind="mlp"))
    connector = ConnectorConfig.model_validate(config["connector"])
    changed = vision.model_dump() | {"post_norm": config["vision_post_norm"]}
    vision = VisionConfig.model_validate(changed)
    return Parts(llm=_llm(text), vision=vision, connector=connector)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the settings that has settings of its own."""
    if not isinstance(section := config[key], Mapping):
        raise _Wrong(f"{key} is {reprlib.repr(section)}; it must be a mapping")
    return section


def _same(config: Mapping[str, Any], key: str, value: Any) -> None:
    """Refuse a field whose value ours are not built with."""
    if (found := config.get(key, value)) != value:
        raise _Wrong(f"{key} is {found!r}; only {value!r} can be held")


def _llm(config: Mapping[str, Any]) -> LLMConfig:
    kind = config.get("model_type", "llama")
    if kind not in _TEXT_TYPES:
        raise _Wrong(f"the language model is of type {kind!r}; read are {', '.join(_TEXT_TYPES)}")
    _same(config, "hidden_act", "silu")
    _same(config, "use_sliding_window", False)
    _same(config, "mlp_bias", False)
    if kind == "llama":
        _same(config, "attention_bias", False)
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = _section(config, key) if config.get(key) else {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise _Wrong(f"its rotary positions are of type {rope_type!r}; only 'default' is read")
    config = _TEXT_DEFAULTS[kind] | dict(config)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if not isinstance(heads, int) or heads < 1:
        raise _Wrong(f"num_attention_heads is {heads!r}; it must be a whole number above 0")
    return LLMConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        rope_base=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qkv_bias=kind == "qwen2",
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def _vision(config: Mapping[str, Any], kind: str, *, layer: Any) -> VisionConfig:
    for key, value in TOWER_KINDS[kind]._asdict().items():
        _same(config, key, value)
    _same(config, "num_channels", 3)
    if not isinstance(layer, int) or layer >= 0:
        raise _Wrong(f"vision_feature_layer is {layer!r}; one layer counted from the end is read")
    defaults = {
        "siglip": (768, 3072, 12, 12, 224, 16),
        "clip": (768, 3072, 12, 12, 224, 32),
    }[kind]
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    # Files of towers leave out what is transformers' default.
    values = {key: config.get(key, value) for key, value in zip(keys, defaults, strict=True)}
    return VisionConfig(
        kind=kind,  # type: ignore[arg-type]
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        num_heads=values["num_attention_heads"],
        ffn_hidden_size=values["intermediate_size"],
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        feature_layer=layer,
    )


def choose_format(parts: Parts, asked: str) -> Format:
    """The format to write: `asked`, or for `auto` the one that most programs read.

    Raises:
        CheckpointError: The model cannot be written so; says why and what is left.
    """
    llm, vision, connector = parts.llm, parts.vision, parts.connector
    whole = llm is not None and vision is not None and connector is not None
    reasons: dict[str, str] = {}
    if llm is None:
        reasons["text"] = "the checkpoint holds no language model"
    elif llm.activation != "swiglu":
        reasons["text"] = (
            f"model.llm.activation={llm.activation} is in no model that transformers has"
        )
    if vision is None:
        reasons["tower"] = "the checkpoint holds no vision tower"
    if not whole:
        reasons["ghostvis"] = (
            "the checkpoint does not hold all of language model, tower and connector"
        )
    elif "text" in reasons:
        reasons["ghostvis"] = reasons["text"]
    if "ghostvis" in reasons:
        reasons["llava"] = reasons["ghostvis"]
    elif connector is not None and connector.kind != "mlp":
        reasons["llava"] = f"LLaVA has no model.connector.kind={connector.kind}, only mlp"
    elif vision is not None and vision.post_norm:
        reasons["llava"] = (
            "LLaVA takes the tower's output before its last norm, "
            "this model was trained with model.vision.post_norm=true"
        )
    possible = [name for name in FORMATS if name not in reasons]
    if asked == "auto":
        order = ("llava", "ghostvis") if whole else ("text", "tower")
        for name in order:
            if name in possible:
                return name  # type: ignore[return-value]
        raise CheckpointError(f"no format can hold this model: {reasons[order[-1]]}")
    if asked not in FORMATS:
        raise CheckpointError(f"--format {asked} is unknown: use auto, {', '.join(FORMATS)}")
    if asked in reasons:
        left = f"; possible: {', '.join(possible)}" if possible else ""
        raise CheckpointError(f"--format {asked}: {reasons[asked]}{left}")
    return asked


def config_of_parts(
    parts: Parts, form: Format, *, dtype: str, vocab: int, tokens: Mapping[str, int]
) -> Config:
    """The content of config.json.

    Args:
        parts: The model.
        form: What `choose_format` returned.
        dtype: Of the weights, as `bfloat16`.
        vocab: Rows of the embedding that are written.
        tokens: Ids of the specials `image`, `bos`, `eos` and `pad`, as far as they are known.
    """
    if form == "text":
        return _text_config(parts, dtype=dtype, vocab=vocab, tokens=tokens)
    if form == "tower":
        config = _tower_config(parts, dtype=dtype)
        kind = "Siglip" if config["model_type"].startswith("siglip") else "CLIP"
        return {"architectures": [f"{kind}VisionModel"], **config}
    vision, connector = parts.vision, parts.connector
    assert parts.llm is not None and vision is not None and connector is not None
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_token_index": tokens.get("image"),
        "image_seq_length": parts.tokens_per_image,
        "vision_feature_select_strategy": "default" if vision.kind == "clip" else "full",
        "vision_feature_layer": vision.feature_layer,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": parts.llm.tied_embeddings,
        "text_config": _text_config(parts, dtype=dtype, vocab=vocab, tokens=tokens),
        "vision_config": _tower_config(parts, dtype=dtype),
        **{f"{name}_token_id": tokens[name] for name in ("bos", "eos", "pad") if name in tokens},
    }
    if form == "ghostvis":
        config |= {
            "architectures": ["GhostVisForConditionalGeneration"],
            "model_type": GHOSTVIS_TYPE,
            # In this order: engines take the base model from `AutoModel`.
            "auto_map": {
                "AutoConfig": "configuration_ghostvis.GhostVisConfig",
                "AutoModel": "modeling_ghostvis.GhostVisModel",
                "AutoModelForImageTextToText": (
                    "modeling_ghostvis.GhostVisForConditionalGeneration"
                ),
            },
            "connector": {
                "kind": connector.kind,
                "tokens_per_image": connector.tokens_per_image,
                "num_layers": connector.num_layers,
                "num_heads": connector.num_heads,
            },
            "vision_post_norm": vision.post_norm,
        }
    return config


def _text_config(parts: Parts, *, dtype: str, vocab: int, tokens: Mapping[str, int]) -> Config:
    llm = parts.llm
    assert llm is not None
    kind = "qwen2" if llm.qkv_bias else "llama"
    config: Config = {
        "architectures": ["Qwen2ForCausalLM" if llm.qkv_bias else "LlamaForCausalLM"],
        "model_type": kind,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": vocab,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": llm.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": llm.norm_eps,
        "use_cache": True,
        "tie_word_embeddings": llm.tied_embeddings,
        # transformers 5 reads the first, earlier ones and some engines the second.
        "rope_parameters": {"rope_theta": llm.rope_base, "rope_type": "default"},
        "rope_theta": llm.rope_base,
        "attention_dropout": 0.0,
    }
    if llm.qkv_bias:
        config |= {"use_sliding_window": False, "sliding_window": None}
    else:
        config |= {"attention_bias": False, "mlp_bias": False}
    if not llm.qkv_bias or llm.head_dim * llm.num_heads != llm.hidden_size:
        config["head_dim"] = llm.head_dim
    for name in ("bos", "eos", "pad"):
        config[f"{name}_token_id"] = tokens.get(name)
    return config


def _tower_config(parts: Parts, *, dtype: str) -> Config:
    vision = parts.vision
    assert vision is not None
    config: Config = {
        "model_type": f"{vision.kind}_vision_model",
        "dtype": dtype,
        "torch_dtype": dtype,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        **TOWER_KINDS[vision.kind]._asdict(),
        "attention_dropout": 0.0,
    }
    if vision.kind == "siglip":
        config["vision_use_head"] = False
    return config


def processor_patches(parts: Parts, form: Format) -> tuple[int, int, str]:
    """(patch_size, num_additional_image_tokens, strategy) for which transformers' LlavaProcessor
    makes as many placeholders as the model has embeddings an image."""
    vision = parts.vision
    assert vision is not None
    if form == "llava":
        extra = 1 if vision.kind == "clip" else 0
        return vision.patch_size, extra, "default" if extra else "full"
    # It counts patches of a square; a coarser grid stands for what the resampler makes of them.
    tokens = parts.tokens_per_image
    side = isqrt(tokens)
    for patch in range(vision.image_size // side, 0, -1):
        if vision.image_size // patch == side:
            return patch, tokens - side**2, "full"
    raise CheckpointError(
        f"{tokens} embeddings of a picture of {vision.image_size} pixels cannot be told to "
        "LlavaProcessor: no patch size divides the picture so"
    )


def model_of_parts(parts: Parts) -> ModelConfig | None:
    """The whole model, where all its parts are there; None otherwise.

    Raises:
        CheckpointError: Sizes that do not fit each other.
    """
    llm, vision, connector = parts.llm, parts.vision, parts.connector
    if problems := list(part_problems(llm, vision, connector)):
        raise CheckpointError(" ".join(problems))
    if llm is None or (vision is None) != (connector is None):
        return None
    return ModelConfig(llm=llm, vision=vision, connector=connector)
