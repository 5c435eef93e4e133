"""The layouts of the CPU set: a covering design over everything that can be combined.

Every pair of values of two dimensions that the rules of `config` allow occurs in some layout of
four processes; layouts of eight add deeper grids. Needs no torch.
"""

from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any

from ghostvis_mega.perf.certify.covering import Choice, cover, most_telling
from ghostvis_mega.perf.certify.layout import Layout, Sections, Settings, merge, parallel


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one value of a dimension adds to a layout."""

    layout: Settings = field(default_factory=dict)
    """Fields of `Layout`."""
    problem: Sections = field(default_factory=dict)
    split: Sections = field(default_factory=dict)


def grid(*degrees: int, problem: Sections | None = None, **more: Any) -> Piece:
    """Degrees of parallelism: tensor, pipeline, virtual pipeline."""
    context = more.get("context", 1)
    return Piece(
        layout={"align": 2 * context} if context > 1 else {},
        split={"parallel": parallel(*degrees, **more)},
        problem=problem or {},
    )


def model(**sections: Settings) -> Piece:
    """Another model."""
    return Piece(problem={"model": sections})


EIGHT_LAYERS: Sections = {"model": {"llm": {"num_layers": 8}}}

GRIDS = {
    "DP4": grid(),
    "TP2(SP) x DP2": grid(2),
    "TP2 x DP2": grid(2, sequence_parallel=False),
    "PP2 x DP2": grid(1, 2),
    "PP2 interleaved x DP2": grid(1, 2, 2),
    "PP4": grid(1, 4),
    "PP4 interleaved": grid(1, 4, 2, problem=EIGHT_LAYERS),
    "TP2(SP) x PP2": grid(2, 2),
    "TP2 x PP2": grid(2, 2, sequence_parallel=False),
    "TP2(SP) x PP2 interleaved": grid(2, 2, 2),
    "CP2 x DP2": grid(context=2),
    "CP4": grid(context=4),
    "TP2(SP) x CP2": grid(2, context=2),
    "PP2 x CP2": grid(1, 2, context=2),
    "PP2 interleaved x CP2": grid(1, 2, 2, context=2),
}
"""Of four processes. SP: sequence parallelism."""

MORE_GRIDS = {
    "DP8": grid(),
    "TP2(SP) x DP4": grid(2),
    "PP4 x DP2": grid(1, 4),
    "PP4 interleaved x DP2": grid(1, 4, 2, problem=EIGHT_LAYERS),
    "TP2(SP) x PP2 x DP2": grid(2, 2),
    "TP2(SP) x PP2 interleaved x DP2": grid(2, 2, 2),
    "TP2(SP) x PP4": grid(2, 4),
    "TP2 x PP4 interleaved": grid(2, 4, 2, problem=EIGHT_LAYERS, sequence_parallel=False),
    "TP2(SP) x CP2 x DP2": grid(2, context=2),
    "TP2(SP) x PP2 x CP2": grid(2, 2, context=2),
    "TP2 x CP4": grid(2, context=4, sequence_parallel=False),
}
"""Of eight processes."""


def uneven(*, num_layers: int = 4, **stages: int) -> Piece:
    """Stages of unequal size, of a model that can be cut so."""
    return Piece(
        problem={"model": {"llm": {"num_layers": num_layers}}},
        split={"parallel": {f"{name}_stage_layers": size for name, size in stages.items()}},
    )


UNEVEN = {
    "PP2 x DP2": uneven(first=3),
    "PP2 interleaved x DP2": uneven(num_layers=6, first=4, last=2),
    "PP4": uneven(num_layers=8, first=1, last=1),
    "PP4 interleaved": uneven(num_layers=12, first=2, last=2),
    "TP2(SP) x PP2": uneven(last=3),
    "TP2 x PP2": uneven(first=1, last=3),
    "TP2(SP) x PP2 interleaved": uneven(num_layers=6, first=2),
    "PP2 x CP2": uneven(last=1),
    "PP2 interleaved x CP2": uneven(num_layers=6, last=4),
    "PP4 x DP2": uneven(num_layers=8, first=2),
    "PP4 interleaved x DP2": uneven(num_layers=12, last=6),
    "TP2(SP) x PP2 x DP2": uneven(last=3),
    "TP2(SP) x PP2 interleaved x DP2": uneven(num_layers=6, first=2),
    "TP2(SP) x PP4": uneven(num_layers=8, first=1, last=1),
    "TP2 x PP4 interleaved": uneven(num_layers=12, first=4, last=4),
    "TP2(SP) x PP2 x CP2": uneven(first=3),
}
"""How the layers are cut where stages are unequal, for each grid that has stages."""

ZERO = {
    "ZeRO-1": Piece(layout={"stage": 1}),
    "ZeRO-0": Piece(layout={"stage": 0}),
    "ZeRO-2": Piece(layout={"stage": 2}),
    "ZeRO-3": Piece(layout={"stage": 3}),
    "ZeRO-1 overlapped": Piece(layout={"stage": 1, "overlap": True}),
    "ZeRO-2 overlapped": Piece(layout={"stage": 2, "overlap": True}),
    "ZeRO-1 offloaded": Piece(layout={"stage": 1, "offload": ("llm",)}),
    "ZeRO-2 offloaded": Piece(layout={"stage": 2, "offload": ("llm",)}),
    "ZeRO-3 offloaded": Piece(layout={"stage": 3, "offload": ("llm",)}),
    "no LLM engine": Piece(),
}
VISION_ZERO = {
    "vision ZeRO-1": Piece(layout={"vision_stage": 1}),
    "vision ZeRO-0": Piece(layout={"vision_stage": 0}),
    "vision ZeRO-2": Piece(layout={"vision_stage": 2}),
    "vision ZeRO-1 offloaded": Piece(layout={"vision_stage": 1, "offload": ("vision",)}),
    "vision ZeRO-2 offloaded": Piece(layout={"vision_stage": 2, "offload": ("vision",)}),
    "no vision engine": Piece(),
}
ROWS = {
    "packed": Piece(),
    "unpacked": Piece(problem={"data": {"packing": False}}),
    "rows of two": Piece(problem={"data": {"packing": False}}, split={"batch": {"micro_size": 2}}),
}
RECOMPUTE = {
    "no recompute": Piece(),
    "selective recompute": Piece(split={"train": {"recompute": "selective"}}),
    "full recompute": Piece(split={"train": {"recompute": "full"}}),
}
LOSS = {
    "scored at once": Piece(split={"train": {"fused_loss": False}}),
    "fused loss": Piece(),
}
STAGES = {"equal stages": Piece(), "unequal stages": Piece()}
FROZEN = ("nothing frozen", "frozen tower", "frozen LLM", "projector alone", "frozen vision")
HEAD = {
    "tied": Piece(),
    "untied": model(llm={"tied_embeddings": False}),
}
CONNECTOR = {
    "avgpool": Piece(),
    "mlp": model(vision={"image_size": 8}, connector={"kind": "mlp", "tokens_per_image": None}),
    "perceiver": model(connector={"kind": "perceiver_mlp"}),
}
TOWER = {
    "SigLIP": Piece(),
    "SigLIP with its last norm": model(vision={"post_norm": True}),
    "CLIP": model(vision={"kind": "clip", "feature_layer": -2}),
}
PICTURES = {
    "some pictures": Piece(),
    "all text": Piece(layout={"kind": "text"}),
    "one picture": Piece(layout={"kind": "one"}),
}
ENCODING = {
    "encoded twice": Piece(),
    "graphs kept": Piece(split={"tower": {"backward": "keep"}}),
    "one by one": Piece(split={"tower": {"images_per_forward": 1}}),
    "graphs kept, one by one": Piece(
        split={"tower": {"backward": "keep", "images_per_forward": 1}}
    ),
    "in windows": Piece(split={"tower": {"window": 1}}),
    "in windows, encoded twice": Piece(split={"tower": {"window": 2, "backward": "recompute"}}),
}
MLP = {"SwiGLU": Piece(), "ReLU2": model(llm={"activation": "relu2", "qkv_bias": False})}
DROPOUT = {"no dropout": Piece(), "dropout": model(llm={"hidden_dropout": 0.1})}
CLIPPING = {"clipped": Piece(), "no clip": Piece(problem={"optim": {"clip_norm": 0.0}})}

DIMENSIONS: dict[str, dict[str, Piece]] = {
    "grid": GRIDS,
    "zero": ZERO,
    "vision_zero": VISION_ZERO,
    "rows": ROWS,
    "recompute": RECOMPUTE,
    "loss": LOSS,
    "frozen": dict.fromkeys(FROZEN, Piece()),
    "stages": STAGES,
    "head": HEAD,
    "connector": CONNECTOR,
    "tower": TOWER,
    "pictures": PICTURES,
    "encoding": ENCODING,
    "mlp": MLP,
    "dropout": DROPOUT,
    "clipping": CLIPPING,
}
"""The first value of each, but the grid's, goes without saying in a layout's name."""

FEWER: dict[str, dict[str, Piece]] = {
    "grid": MORE_GRIDS,
    "zero": {name: ZERO[name] for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3")},
    "rows": {name: ROWS[name] for name in ("packed", "rows of two")},
    "stages": STAGES,
    "connector": {name: CONNECTOR[name] for name in ("avgpool", "perceiver")},
    "pictures": {name: PICTURES[name] for name in ("some pictures", "one picture")},
}
"""Dimensions of the layouts of eight processes."""


def legal(choice: Choice) -> bool:
    """Whether a partial combination means something and is allowed; see `config.rules`."""
    frozen, zero, vision = (choice.get(name) for name in ("frozen", "zero", "vision_zero"))
    where = choice.get("grid", "")
    if zero in ("ZeRO-3", "ZeRO-3 offloaded") and "PP" in where:
        return False
    if (
        frozen
        and zero
        and (zero == "no LLM engine") != (frozen in ("frozen LLM", "projector alone"))
    ):
        return False
    if frozen and vision and (vision == "no vision engine") != (frozen == "frozen vision"):
        return False
    if choice.get("stages") == "unequal stages" and where and "PP" not in where:
        return False
    if "PP" in where and "windows" in choice.get("encoding", ""):
        return False
    rows = choice.get("rows")
    # Eight rows a step: one a replica, and as many micro-batches as interleaved stages want.
    return not (rows == "rows of two" and ("DP8" in where or where == "PP4 interleaved x DP2"))


def frozen_modules(choice: Choice) -> list[str]:
    """The value of `train.freeze`."""
    resampler = ["resampler"] if choice.get("connector") == "perceiver" else []
    return {
        "nothing frozen": [],
        "frozen tower": ["vision"],
        "frozen LLM": ["llm"],
        "projector alone": ["llm", "vision", *resampler],
        "frozen vision": ["vision", *resampler, "projector"],
    }[choice.get("frozen", "nothing frozen")]


def build(dimensions: dict[str, dict[str, Piece]], choice: Choice, *, ranks: int) -> Layout:
    """The layout of one whole combination."""
    pieces = [dimensions[name][value] for name, value in choice.items()]
    if choice.get("stages") == "unequal stages":
        pieces.append(UNEVEN.get(choice["grid"], uneven(first=3)))
    said = [
        value
        for name, value in choice.items()
        if name == "grid" or value != next(iter(dimensions[name]))
    ]
    freeze = frozen_modules(choice)
    problem = reduce(merge, (piece.problem for piece in pieces), {})
    fields = reduce(merge, (piece.layout for piece in pieces), {})
    fields["offload"] = tuple(e for piece in pieces for e in piece.layout.get("offload", ()))
    return Layout(
        name=", ".join(said),
        ranks=ranks,
        problem=merge(problem, {"train": {"freeze": freeze}} if freeze else {}),
        split=reduce(merge, (piece.split for piece in pieces), {}),
        **fields,
    )


@cache
def cpu_layouts() -> tuple[Layout, ...]:
    """All layouts, those of equal grids beside each other, so that they can share groups."""
    return tuple(
        build(dimensions, choice, ranks=ranks)
        for dimensions, ranks in ((DIMENSIONS, 4), (FEWER, 8))
        for choice in in_grid_order(choices(dimensions), dimensions)
    )


@cache
def few_cpu_layouts(count: int) -> tuple[Layout, ...]:
    """The layouts of four processes that tell most: every value occurs, and many pairs."""
    picked = most_telling(choices(DIMENSIONS), count)
    return tuple(build(DIMENSIONS, choice, ranks=4) for choice in in_grid_order(picked, DIMENSIONS))


def choices(dimensions: dict[str, dict[str, Piece]]) -> list[Choice]:
    """The covering design over some dimensions."""
    return cover({name: list(values) for name, values in dimensions.items()}, legal)


def in_grid_order(picked: list[Choice], dimensions: dict[str, dict[str, Piece]]) -> list[Choice]:
    """Combinations of equal grids together."""
    places = list(dimensions["grid"])
    return sorted(picked, key=lambda choice: places.index(choice["grid"]))
