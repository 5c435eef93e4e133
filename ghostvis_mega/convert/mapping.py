"""The one table of names: every parameter of ours, the Hugging Face tensors it is made of, and how.

A rule names a parameter of ours and the tensors on the other side with their sizes. Whatever the
rule does, a parameter of ours is a sequence of *runs*: stretches of elements, row-major, of the
tensors on the other side. So import concatenates runs, export cuts them apart, and nobody
else needs to know what a query group is. Imports no torch.

Sizes: V vocabulary, H hidden, Q query width, K key/value width, F MLP width; tower: C width, M MLP
width, S positions, p patch side; T latents; numbers stand for themselves.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from ghostvis_mega.config.schema import (
    ConnectorConfig,
    LLMConfig,
    ModelConfig,
    Module,
    VisionConfig,
)

VERSION = 1
"""Of the table; exports record it."""

Op = Literal["copy", "stack", "qkv"]


@dataclass(frozen=True)
class Parts:
    """The parts of a model that a set of weights holds."""

    llm: LLMConfig | None = None
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> "Parts":
        """All parts of a model."""
        return cls(llm=model.llm, vision=model.vision, connector=model.connector)

    @property
    def tokens_per_image(self) -> int:
        """LLM positions that one image takes; 0 without tower and connector."""
        if self.vision is None or self.connector is None:
            return 0
        return self.connector.tokens_per_image or self.vision.num_patches


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


_TEXT = (Rule("embedding.weight", ("{llm}embed_tokens.weight: V H",)),)
_TEXT_LAYER = (
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
_TEXT_END = (
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


_TOWER = _same(
    "tower.",
    "tower",
    "embeddings.class_embedding: C",
    "embeddings.patch_embedding.weight: C 3 p p",
    "embeddings.patch_embedding.bias: C",
    "embeddings.position_embedding.weight: S C",
    "pre_layrnorm.weight: C",
    "pre_layrnorm.bias: C",
)
_TOWER_LAYER = _same(
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
_TOWER_END = _same("tower.", "tower", "post_layernorm.weight: C", "post_layernorm.bias: C")
_ONLY = {
    "siglip": ("tower.embeddings.patch_embedding.bias",),
    "clip": (
        "tower.embeddings.class_embedding",
        "tower.pre_layrnorm.weight",
        "tower.pre_layrnorm.bias",
    ),
}
"""Parameters that one kind of tower has and the other has not."""

_RESAMPLER = (Rule("resampler.latents", ("{projector}resampler.latents: T C",)),)
_RESAMPLER_LAYER = tuple(
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
_RESAMPLER_END = tuple(
    Rule(f"resampler.norm.{kind}", (f"{{projector}}resampler.norm.{kind}: C",))
    for kind in ("weight", "bias")
)
_PROJECTOR = _same(
    "projector.",
    "projector",
    "linear_1.weight: H C",
    "linear_1.bias: H",
    "linear_2.weight: H H",
    "linear_2.bias: H",
)


@dataclass(frozen=True)
class HFTensor:
    """A tensor on the other side."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Elements of one tensor on the other side."""

    tensor: int
    """Place in `Entry.hf`."""
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and its tensors on the other side."""

    native: str
    shape: tuple[int, ...]
    module: Module
    hf: tuple[HFTensor, ...]
    runs: tuple[Run, ...]
    """Their concatenation is the parameter; rows behind them are vocabulary padding."""

    def native_runs(self, tensor: int) -> Iterator[tuple[int, int]]:
        """(first element in the parameter, number) whose concatenation is a tensor of `hf`."""
        at, found = 0, []
        for run in self.runs:
            if run.tensor == tensor:
                found.append((run.start, at, run.length))
            at += run.length
        yield from ((at, length) for _, at, length in sorted(found))


def entries(parts: Parts, layout: Layout, *, hf_vocab: int | None = None) -> list[Entry]:
    """All parameters that both the model and the layout have, in the order of exported files.

    Args:
        parts: The model.
        layout: The other side's names.
        hf_vocab: Rows of embedding and head there; ours may be padded beyond them.
    """
    sizes = _sizes(parts)
    found = []
    for rule, index in _rules(parts):
        names = [_name(item, layout, index) for item in rule.hf]
        if all(name is not None for name, _ in names):
            found.append(_entry(rule, index, names, sizes, parts, hf_vocab))
    return found


def _rules(parts: Parts) -> Iterator[tuple[Rule, int]]:
    """Rules of a model with the number of their layer (0 elsewhere)."""
    if (llm := parts.llm) is not None:
        yield from _plain(_TEXT)
        lacks = () if llm.qkv_bias else ("linear_qkv.bias",)
        yield from _layers(_TEXT_LAYER, llm.num_layers, lacks)
        yield from _plain(_TEXT_END[:1] if llm.tied_embeddings else _TEXT_END)
    if (vision := parts.vision) is not None:
        lacks = _ONLY["clip" if vision.kind == "siglip" else "siglip"]
        yield from _plain(rule for rule in _TOWER if rule.native not in lacks)
        yield from _layers(_TOWER_LAYER, vision.num_layers)
        yield from _plain(_TOWER_END)
    if (connector := parts.connector) is not None:
        if connector.kind == "perceiver_mlp":
            yield from _plain(_RESAMPLER)
            yield from _layers(_RESAMPLER_LAYER, connector.num_layers)
            yield from _plain(_RESAMPLER_END)
        yield from _plain(_PROJECTOR)


def _plain(rules: Iterable[Rule]) -> Iterator[tuple[Rule, int]]:
    return ((rule, 0) for rule in rules)


def _layers(
    rules: tuple[Rule, ...], count: int, lacks: tuple[str, ...] = ()
) -> Iterator[tuple[Rule, int]]:
    for index in range(count):
        for rule in rules:
            if not rule.native.endswith(lacks or ("\0",)):
                yield rule, index


def _name(item: str, layout: Layout, index: int) -> tuple[str | None, str]:
    """Name (None where the layout lacks the part) and sizes of `NAME: SIZES`."""
    name, _, sizes = item.partition(": ")
    slot, _, rest = name.removeprefix("{").partition("}")
    prefix = layout.prefix(slot)
    return (None if prefix is None else prefix + rest.replace("{i}", str(index))), sizes


def _sizes(parts: Parts) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if (llm := parts.llm) is not None:
        sizes |= {
            "V": llm.vocab_size,
            "H": llm.hidden_size,
            "Q": llm.num_heads * llm.head_dim,
            "K": llm.num_kv_heads * llm.head_dim,
            "F": llm.ffn_hidden_size,
        }
    if (vision := parts.vision) is not None:
        width = vision.hidden_size
        sizes |= {
            "C": width,
            "2C": 2 * width,
            "4C": 4 * width,
            "M": vision.ffn_hidden_size,
            "S": vision.num_patches + (1 if vision.kind == "clip" else 0),
            "p": vision.patch_size,
            "T": parts.tokens_per_image,
        }
    return sizes


def _entry(
    rule: Rule,
    index: int,
    names: list[tuple[str | None, str]],
    sizes: dict[str, int],
    parts: Parts,
    hf_vocab: int | None,
) -> Entry:
    tensors, rows = [], 0
    for name, text in names:
        symbols = text.split()
        shape = [sizes[s] if s in sizes else int(s) for s in symbols]
        rows += shape[0]
        if symbols[0] == "V" and hf_vocab is not None:
            shape[0] = hf_vocab
        assert name is not None
        tensors.append(HFTensor(name, tuple(shape)))
    native = rule.native.replace("{i}", str(index))
    return Entry(
        native=native,
        shape=(rows, *tensors[0].shape[1:]),
        module=module_of(native),
        hf=tuple(tensors),
        runs=tuple(_runs(rule.op, tensors, parts.llm)),
    )


def _runs(op: Op, tensors: list[HFTensor], llm: LLMConfig | None) -> Iterator[Run]:
    if op != "qkv":
        yield from (Run(i, 0, prod(tensor.shape)) for i, tensor in enumerate(tensors))
        return
    assert llm is not None
    for group in range(llm.num_kv_heads):
        for i, tensor in enumerate(tensors):
            length = prod(tensor.shape) // llm.num_kv_heads
            yield Run(i, group * length, length)


def module_of(native: str) -> Module:
    """The module that a parameter of ours belongs to."""
    head = native.partition(".")[0]
    modules: dict[str, Module] = {
        "tower": "vision",
        "resampler": "resampler",
        "projector": "projector",
    }
    return modules.get(head, "llm")
