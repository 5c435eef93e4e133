"""Exports hold the tensors that vLLM's loaders know, no more and no fewer.

The names are those of vLLM 0.33.0, read in its source (it is not installed here):
`model_executor/models/qwen2.py` for `Qwen2ForCausalLM`; `llava.py` for
`LlavaForConditionalGeneration`, whose loader hands what stands behind `language_model.` to Qwen2,
and what stands behind `vision_tower.` to `siglip.py` or `clip.py`, which keep a module
`vision_model` of their own. A name that leads to no parameter stops it ("There is no module or
parameter named ..."); `q_proj`, `k_proj`, `v_proj` and `gate_proj`, `up_proj` go into its fused
matrices. LLaVA does not build the tower's last norm nor layers behind the one that it uses: their
tensors are passed over, and transformers wants them.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from ghostvis_mega.convert import mapping, table
from ghostvis_mega.convert.exporter import export_hf
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from tests.convert.cases import TEXT, TOWER, build, save, tensors_of
from tests.convert.test_stock_programs import OPTIONS

QWEN2 = ("model.embed_tokens.weight", "model.norm.weight")
QWEN2_UNTIED = ("lm_head.weight",)
QWEN2_LAYER = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
PROJECTOR = (
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.linear_1.bias",
    "multi_modal_projector.linear_2.weight",
    "multi_modal_projector.linear_2.bias",
)
TOWERS = {
    "siglip": (
        "embeddings.patch_embedding.weight",
        "embeddings.patch_embedding.bias",
        "embeddings.position_embedding.weight",
        "post_layernorm.weight",
        "post_layernorm.bias",
    ),
    "clip": (
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "pre_layrnorm.weight",
        "pre_layrnorm.bias",
        "post_layernorm.weight",
        "post_layernorm.bias",
    ),
}
TOWER_LAYER = (
    "layer_norm1.weight",
    "layer_norm1.bias",
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    "layer_norm2.weight",
    "layer_norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
)
NAMES = ("qwen2", "qwen2-tied", "llava-siglip", "llava-clip", "llava-siglip-tied")


def known(name: str) -> set[str]:
    """The recorded names for a model of `cases`, over its layers."""
    layers = range(TEXT["num_hidden_layers"])
    text = {*QWEN2, *(() if name.endswith("tied") else QWEN2_UNTIED)}
    text |= {f"model.layers.{i}.{tensor}" for i in layers for tensor in QWEN2_LAYER}
    if name.startswith("qwen2"):
        return text
    inside = set(TOWERS[name.split("-")[1]])
    layers = range(TOWER["num_hidden_layers"])
    inside |= {f"encoder.layers.{i}.{tensor}" for i in layers for tensor in TOWER_LAYER}
    return {
        *(f"language_model.{tensor}" for tensor in text),
        *(f"vision_tower.vision_model.{tensor}" for tensor in inside),
        *PROJECTOR,
    }


def imported(name: str, folder: Path) -> Path:
    source = save(build(name), folder / "source")
    return import_hf([source], folder / "native", ImportOptions())


def exported_names(native: Path, out: Path) -> set[str]:
    return set(tensors_of(export_hf(native, out, OPTIONS)))


@pytest.mark.parametrize("name", NAMES)
def test_an_export_has_the_names_that_vllm_knows(tmp_path: Path, name: str):
    assert exported_names(imported(name, tmp_path), tmp_path / "out") == known(name)


def test_a_changed_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    native = imported("llava-siglip", tmp_path)
    renamed = tuple(
        replace(rule, hf=tuple(one.replace("{llm}norm.", "{llm}final_norm.") for one in rule.hf))
        for rule in table.TEXT_END
    )
    with monkeypatch.context() as patched:
        patched.setattr(mapping, "TEXT_END", renamed)
        found = exported_names(native, tmp_path / "norm")
    wrong = {f"language_model.model.{name}.weight" for name in ("norm", "final_norm")}
    assert found ^ known("llava-siglip") == wrong
    # As transformers 5 names the tower of a fresh model: vLLM stops at it.
    flat = replace(table.LAYOUTS["llava"], tower="vision_tower.")
    monkeypatch.setitem(table.LAYOUTS, "llava", flat)
    found = exported_names(native, tmp_path / "flat")
    assert len(found ^ known("llava-siglip")) == 2 * (5 + 3 * 16)
