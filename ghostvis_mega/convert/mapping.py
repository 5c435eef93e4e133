"""What the table of names says about one model: its parameters, their tensors, and the elements.

A rule names a parameter of ours and the tensors on the other side with their sizes. Whatever the
rule does, a parameter of ours is a sequence of *runs*: stretches of elements, row-major, of the
tensors on the other side. So import concatenates runs, export cuts them apart, and nobody
else needs to know what a query group is. Imports no torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from ghostvis_mega.config.schema import (
    ConnectorConfig,
    LLMConfig,
    ModelConfig,
    Module,
    VisionConfig,
)
from ghostvis_mega.convert.table import (
    ONLY,
    PROJECTOR,
    RESAMPLER,
    RESAMPLER_END,
    RESAMPLER_LAYER,
    TEXT,
    TEXT_END,
    TEXT_LAYER,
    TOWER,
    TOWER_END,
    TOWER_LAYER,
    Layout,
    Op,
    Rule,
)


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
        yield from _plain(TEXT)
        lacks = () if llm.qkv_bias else ("linear_qkv.bias",)
        yield from _layers(TEXT_LAYER, llm.num_layers, lacks)
        yield from _plain(TEXT_END[:1] if llm.tied_embeddings else TEXT_END)
    if (vision := parts.vision) is not None:
        lacks = ONLY["clip" if vision.kind == "siglip" else "siglip"]
        yield from _plain(rule for rule in TOWER if rule.native not in lacks)
        yield from _layers(TOWER_LAYER, vision.num_layers)
        yield from _plain(TOWER_END)
    if (connector := parts.connector) is not None:
        if connector.kind == "perceiver_mlp":
            yield from _plain(RESAMPLER)
            yield from _layers(RESAMPLER_LAYER, connector.num_layers)
            yield from _plain(RESAMPLER_END)
        yield from _plain(PROJECTOR)


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
