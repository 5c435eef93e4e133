"""The table of names itself: which tensors each parameter of ours is made of, in each layout.

Sizes: V vocabulary, H hidden, Q query width, K key/value width, F MLP width; tower: C width, M MLP
width, S positions, p patch side; T latents; numbers stand for themselves.
"""

from dataclasses import dataclass
from typing import Literal

VERSION = 1
"""Of the table; exports record it."""

Op = Literal["copy", "stack", "qkv"]


@dataclass(frozen=True)
class Layout:
    """Where a kind of directory keeps the parts; None: it does not hold them."""

    name: str
    llm: str | None = None
    head: str | None = None
    tower: str | None = None
    projector: str | None = None

    def prefix(self, slot: str) -> str | None:
        """What a slot of a rule stands for."""
        return getattr(self, slot)


LAYOUTS = {
    layout.name: layout
    for layout in (
        # What the hub's LLaVA checkpoints hold and every engine reads.
        Layout(
            "llava",
            llm="language_model.model.",
            head="language_model.lm_head.weight",
            tower="vision_tower.vision_model.",
            projector="multi_modal_projector.",
        ),
        # transformers >= 5.6 saves models that it made itself without `vision_model`.
        Layout(
            "llava-flat",
            llm="language_model.model.",
            head="language_model.lm_head.weight",
            tower="vision_tower.",
            projector="multi_modal_projector.",
        ),
        # transformers 4.52 to 5.5.
        Layout(
            "llava-nested",
            llm="model.language_model.",
            head="lm_head.weight",
            tower="model.vision_tower.vision_model.",
            projector="model.multi_modal_projector.",
        ),
        # Exactly the module names of today: what transformers wants of models with code of
        # their own.
        Layout(
            "ghostvis",
            llm="model.language_model.",
            head="lm_head.weight",
            tower="model.vision_tower.",
            projector="model.multi_modal_projector.",
        ),
        Layout("text", llm="model.", head="lm_head.weight"),
        Layout("tower", tower="vision_model."),
        Layout("tower-flat", tower=""),
    )
}
"""Ways to name the same tensors. Qwen2 and Llama models share `text`."""

IGNORED = (
    "{tower}embeddings.position_ids",
    "{tower}head.",
    "text_model.",
    "logit_scale",
    "logit_bias",
    "text_projection.",
    "visual_projection.",
    "{llm}rotary_emb.",
)
"""Beginnings of names that an import passes over: buffers, and parts of SigLIP and CLIP beside the
tower."""


@dataclass(frozen=True)
class Rule:
    """One parameter of ours; `{i}` counts layers, other braces are slots of a layout."""

    native: str
    hf: tuple[str, ...]
    """`NAME: SIZES` of each tensor."""
    op: Op = "copy"
    """`stack`: one after the other along the first dimension; `qkv`: for each key/value head its
    queries, its key and its value."""


TEXT = (Rule("embedding.weight", ("{llm}embed_tokens.weight: V H",)),)
TEXT_LAYER = (
    Rule(
        "decoder.layers.{i}.input_layernorm.weight", ("{llm}layers.{i}.input_layernorm.weight: H",)
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        (
            "{llm}layers.{i}.self_attn.q_proj.weight: Q H",
            "{llm}layers.{i}.self_attn.k_proj.weight: K H",
            "{llm}layers.{i}.self_attn.v_proj.weight: K H",
        ),
        op="qkv",
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        (
            "{llm}layers.{i}.self_attn.q_proj.bias: Q",
            "{llm}layers.{i}.self_attn.k_proj.bias: K",
            "{llm}layers.{i}.self_attn.v_proj.bias: K",
        ),
        op="qkv",
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        ("{llm}layers.{i}.self_attn.o_proj.weight: H Q",),
    ),
    Rule(
        "decoder.layers.{i}.pre_mlp_layernorm.weight",
        ("{llm}layers.{i}.post_attention_layernorm.weight: H",),
    ),
    Rule(
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        (
            "{llm}layers.{i}.mlp.gate_proj.weight: F H",
            "{llm}layers.{i}.mlp.up_proj.weight: F H",
        ),
        op="stack",
    ),
    Rule(
        "decoder.layers.{i}.mlp.linear_fc2.weight",
        ("{llm}layers.{i}.mlp.down_proj.weight: H F",),
    ),
)
TEXT_END = (
    Rule("decoder.final_layernorm.weight", ("{llm}norm.weight: H",)),
    Rule("head.weight", ("{head}: V H",)),
)


def _same(prefix: str, slot: str, *named: str) -> tuple[Rule, ...]:
    """Parameters whose name behind a prefix is the same on both sides."""
    rules = []
    for item in named:
        name = item.partition(":")[0]
        rules.append(Rule(prefix + name, (f"{{{slot}}}{item}",)))
    return tuple(rules)


TOWER = _same(
    "tower.",
    "tower",
    "embeddings.class_embedding: C",
    "embeddings.patch_embedding.weight: C 3 p p",
    "embeddings.patch_embedding.bias: C",
    "embeddings.position_embedding.weight: S C",
    "pre_layrnorm.weight: C",
    "pre_layrnorm.bias: C",
)
TOWER_LAYER = _same(
    "tower.",
    "tower",
    "encoder.layers.{i}.layer_norm1.weight: C",
    "encoder.layers.{i}.layer_norm1.bias: C",
    *(
        f"encoder.layers.{{i}}.self_attn.{part}_proj.{kind}"
        for part in ("q", "k", "v", "out")
        for kind in ("weight: C C", "bias: C")
    ),
    "encoder.layers.{i}.layer_norm2.weight: C",
    "encoder.layers.{i}.layer_norm2.bias: C",
    "encoder.layers.{i}.mlp.fc1.weight: M C",
    "encoder.layers.{i}.mlp.fc1.bias: M",
    "encoder.layers.{i}.mlp.fc2.weight: C M",
    "encoder.layers.{i}.mlp.fc2.bias: C",
)
TOWER_END = _same("tower.", "tower", "post_layernorm.weight: C", "post_layernorm.bias: C")
ONLY = {
    "siglip": ("tower.embeddings.patch_embedding.bias",),
    "clip": (
        "tower.embeddings.class_embedding",
        "tower.pre_layrnorm.weight",
        "tower.pre_layrnorm.bias",
    ),
}
"""Parameters that one kind of tower has and the other has not."""

RESAMPLER = (Rule("resampler.latents", ("{projector}resampler.latents: T C",)),)
RESAMPLER_LAYER = tuple(
    Rule(f"resampler.layers.{{i}}.{name}", (f"{{projector}}resampler.layers.{{i}}.{name}: {size}",))
    for part, rows, columns in (
        ("norm_latents", "C", ""),
        ("norm_patches", "C", ""),
        ("norm_mlp", "C", ""),
        ("q_proj", "C", " C"),
        ("kv_proj", "2C", " C"),
        ("out_proj", "C", " C"),
        ("fc1", "4C", " C"),
        ("fc2", "C", " 4C"),
    )
    for name, size in ((f"{part}.weight", rows + columns), (f"{part}.bias", rows))
)
RESAMPLER_END = tuple(
    Rule(f"resampler.norm.{kind}", (f"{{projector}}resampler.norm.{kind}: C",))
    for kind in ("weight", "bias")
)
PROJECTOR = _same(
    "projector.",
    "projector",
    "linear_1.weight: H C",
    "linear_1.bias: H",
    "linear_2.weight: H H",
    "linear_2.bias: H",
)
