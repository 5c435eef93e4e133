"""Small Hugging Face models with random weights, norms and biases included, as directories."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ghostvis_mega.convert.remote.configuration_ghostvis import GhostVisConfig
from ghostvis_mega.convert.remote.modeling_ghostvis import GhostVisForConditionalGeneration

IMAGE = 5
CPU = torch.device("cpu")

TEXT: dict[str, Any] = {
    # 28 heads on 4: the ratio of the 7B model, no power of two.
    "num_hidden_layers": 3,
    "hidden_size": 112,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 157,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# 12 heads on 2, tied: the 1.5B model.
TIED = TEXT | {
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TOWER: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
PERCEIVER = {"kind": "perceiver_mlp", "tokens_per_image": 9, "num_layers": 2, "num_heads": 4}
AVERAGE = {"kind": "avgpool_mlp", "tokens_per_image": 4, "num_layers": 2, "num_heads": 8}

ATTENTION = {"attn_implementation": "eager"}


def randomise(model: nn.Module, seed: int = 7) -> nn.Module:
    """Random parameters, none at 0 or 1: a forgotten norm or bias must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            norm = "norm" in name and name.endswith("weight")
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * (0.2 if norm else 0.1) + (1.0 if norm else 0.0))
    return model.eval()


def llava_config(tower: str, text: dict[str, Any], kind: type[LlavaConfig] = LlavaConfig, **more):
    """Configuration of a VLM over a SigLIP or CLIP tower."""
    vision = (
        SiglipVisionConfig(**TOWER, vision_use_head=False)
        if tower == "siglip"
        else CLIPVisionConfig(**TOWER)
    )
    settings = {
        "text_config": Qwen2Config(**text),
        "vision_config": vision,
        "image_token_index": IMAGE,
        "image_seq_length": 16,
        "vision_feature_layer": -1 if tower == "siglip" else -2,
        "vision_feature_select_strategy": "full" if tower == "siglip" else "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    return kind(**(settings | more), **ATTENTION)


def build(name: str) -> nn.Module:
    """A model by its name in `MODELS`."""
    if name == "qwen2":
        return randomise(Qwen2ForCausalLM(Qwen2Config(**TEXT, **ATTENTION)))
    if name == "qwen2-tied":
        return randomise(Qwen2ForCausalLM(Qwen2Config(**TIED, **ATTENTION)))
    if name == "llama":
        return randomise(LlamaForCausalLM(LlamaConfig(**TIED, head_dim=8, **ATTENTION)))
    if name == "siglip":
        return randomise(SiglipVisionModel(SiglipVisionConfig(**TOWER, vision_use_head=False)))
    if name == "clip":
        return randomise(CLIPVisionModel(CLIPVisionConfig(**TOWER)))
    kind, tower = name.split("-")[:2]
    text = TIED if name.endswith("tied") else TEXT
    if kind == "llava":
        return randomise(LlavaForConditionalGeneration(llava_config(tower, text)))
    connector = PERCEIVER if kind == "perceiver" else AVERAGE
    config = llava_config(
        tower, text, GhostVisConfig, connector=connector, vision_post_norm=name.endswith("norm")
    )
    return randomise(GhostVisForConditionalGeneration(config))


TEXTS = ("qwen2", "qwen2-tied", "llama")
VLMS = (
    "llava-siglip",
    "llava-clip",
    "llava-siglip-tied",
    "perceiver-siglip",
    "perceiver-clip",
    "avgpool-siglip-norm",
)
MODELS = (*TEXTS, "siglip", "clip", *VLMS)

LAYOUTS = ("llava", "llava-flat", "llava-nested")


def canonical(name: str) -> str:
    """A module's parameter name as the hub's LLaVA checkpoints have it."""
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def nested(name: str) -> str:
    """As transformers 4.52 to 5.5 saved it."""
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")


def save(
    model: nn.Module,
    folder: Path,
    *,
    layout: str = "",
    dtype: torch.dtype | None = None,
    files: int = 1,
) -> Path:
    """Write config.json and weights under the names of a layout; `files` shards with an index."""
    folder.mkdir(parents=True)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    tensors = {
        name: (p if dtype is None else p.to(dtype)).detach().contiguous()
        for name, p in model.named_parameters()
        if not (tied and name == "lm_head.weight")
    }
    kind = model.config.model_type
    if kind == "llava":
        rename = {
            "llava": canonical,
            "llava-flat": lambda n: canonical(n).replace("vision_model.", ""),
            "llava-nested": nested,
        }[layout or "llava"]
        tensors = {rename(name): tensor for name, tensor in tensors.items()}
    elif kind.endswith("vision_model"):
        tensors = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names, weight_map = sorted(tensors), {}
        for number in range(files):
            file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::files]}
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose type, shape or any bit differs, or that only one side has."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or one[name].shape != other[name].shape
        or not torch.equal(
            one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)
        )
    ]
