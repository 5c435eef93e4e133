"""The layouts of four ranks that are compared with one plain process.

Needs no torch, so that pytest can list them at once.
"""

from dataclasses import dataclass, field
from typing import Any

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to run one training problem on the world; what no degree names is data-parallel."""

    name: str
    stage: int = 1
    """ZeRO stage; see `problem.make_run`."""
    overlap: bool = False
    kind: str = "mixed"
    """Pictures of the batch; see `problem.SHOWN`."""
    problem: Sections = field(default_factory=dict)
    """Settings that define what is computed; the reference shares them."""
    split: Sections = field(default_factory=dict)
    """Settings of how it is computed."""


def parallel(
    tensor: int = 1, pipeline: int = 1, virtual_pipeline: int = 1, **more: Any
) -> dict[str, Any]:
    """The settings' section of parallel degrees."""
    return {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual_pipeline, **more}


TP = {"parallel": parallel(2)}
PP = {"parallel": parallel(1, 2)}
VPP = {"parallel": parallel(1, 2, 2)}
TPPP = {"parallel": parallel(2, 2)}
ROWS_OF_TWO = {"batch": {"micro_size": 2}}
UNPACKED: Sections = {"data": {"packing": False}}
ALIGN: Sections = {"train": {"freeze": ["llm"]}}
FROZEN_TOWER: Sections = {"train": {"freeze": ["vision"]}}
PROJECTOR_ONLY: Sections = {"train": {"freeze": ["llm", "vision", "resampler"]}}
FROZEN_VISION: Sections = {"train": {"freeze": ["vision", "resampler", "projector"]}}
UNTIED: Sections = {"model": {"llm": {"tied_embeddings": False}}}
LEGACY: Sections = {
    "model": {"llm": {"activation": "relu2", "qkv_bias": False, "tied_embeddings": False}}
}
PERCEIVER: Sections = {
    "model": {
        "vision": {"kind": "clip", "feature_layer": -2},
        "connector": {"kind": "perceiver_mlp"},
    }
}
PLAIN_MLP: Sections = {
    "model": {
        "vision": {"image_size": 8, "post_norm": True},
        "connector": {"kind": "mlp", "tokens_per_image": None},
    }
}
NO_CLIP: Sections = {"optim": {"clip_norm": 0.0}}

# Neighbours share their degrees where they can: the worker then keeps the process groups.
LAYOUTS = [
    Layout(name="DP4, ZeRO-0", stage=0),
    Layout(name="DP4, ZeRO-1"),
    Layout(name="DP4, ZeRO-1, overlapped reduction", overlap=True),
    Layout(name="DP4, ZeRO-2", stage=2),
    Layout(name="DP4, ZeRO-3", stage=3),
    Layout(name="DP4, ZeRO-2, rows of two", stage=2, problem=UNPACKED, split=ROWS_OF_TWO),
    Layout(name="DP4, ZeRO-3, untied", stage=3, problem=UNTIED),
    Layout(name="DP4, ZeRO-2, one picture", stage=2, kind="one"),
    Layout(
        name="DP4, ZeRO-1, mlp connector after the final norm, no clip", problem=PLAIN_MLP | NO_CLIP
    ),
    Layout(name="TP2(SP) x DP2, ZeRO-1", split=TP),
    Layout(name="TP2(SP) x DP2, ZeRO-2", stage=2, split=TP),
    Layout(name="TP2(SP) x DP2, ZeRO-3", stage=3, split=TP),
    Layout(
        name="TP2 x DP2 without SP, ZeRO-1",
        split={"parallel": parallel(2, sequence_parallel=False)},
    ),
    Layout(
        name="TP2(SP) x DP2, selective recompute", split=TP | {"train": {"recompute": "selective"}}
    ),
    Layout(name="TP2(SP) x DP2, rows of two", problem=UNPACKED, split=TP | ROWS_OF_TWO),
    Layout(name="TP2(SP) x DP2, frozen LLM", problem=ALIGN, split=TP),
    Layout(name="TP2(SP) x DP2, projector alone", problem=PROJECTOR_ONLY, split=TP),
    Layout(name="TP2(SP) x DP2, ReLU2 without biases", problem=LEGACY, split=TP),
    Layout(name="PP2 x DP2, ZeRO-1", split=PP),
    Layout(name="PP2 x DP2, ZeRO-2", stage=2, split=PP),
    Layout(name="PP2 x DP2, all text", kind="text", split=PP),
    Layout(name="PP2 x DP2, all text, frozen LLM", kind="text", problem=ALIGN, split=PP),
    Layout(name="PP2 x DP2, one picture, frozen LLM", kind="one", problem=ALIGN, stage=2, split=PP),
    Layout(name="PP2 x DP2, frozen LLM", problem=ALIGN, split=PP),
    Layout(name="PP2 x DP2, frozen vision", problem=FROZEN_VISION, stage=2, split=PP),
    Layout(name="PP2 interleaved x DP2, ZeRO-1", split=VPP),
    Layout(name="PP2 interleaved x DP2, ZeRO-2", stage=2, split=VPP),
    Layout(name="PP2 interleaved x DP2, rows of two", problem=UNPACKED, split=VPP | ROWS_OF_TWO),
    Layout(
        name="PP2 interleaved x DP2, projector alone", problem=PROJECTOR_ONLY, stage=2, split=VPP
    ),
    Layout(name="TP2(SP) x PP2, ZeRO-0", stage=0, split=TPPP),
    Layout(name="TP2(SP) x PP2, ZeRO-1", split=TPPP),
    Layout(
        name="TP2(SP) x PP2, ZeRO-2, rows of two",
        stage=2,
        problem=UNPACKED,
        split=TPPP | ROWS_OF_TWO,
    ),
    Layout(name="TP2(SP) x PP2, untied", problem=UNTIED, split=TPPP),
    Layout(name="TP2(SP) x PP2, full recompute", split=TPPP | {"train": {"recompute": "full"}}),
    Layout(name="TP2(SP) x PP2, all text", kind="text", stage=2, split=TPPP),
    Layout(name="TP2(SP) x PP2, one picture", kind="one", split=TPPP),
    Layout(name="TP2(SP) x PP2, frozen tower", problem=FROZEN_TOWER, stage=2, split=TPPP),
    Layout(
        name="TP2(SP) x PP2, perceiver on CLIP, graphs kept",
        problem=PERCEIVER,
        split=TPPP | {"tower": {"backward": "keep", "images_per_forward": 1}},
    ),
]

SKIPS = [
    Layout(name="DP4, ZeRO-3", stage=3),
    Layout(name="TP2(SP) x DP2, ZeRO-0", stage=0, split=TP),
    Layout(name="TP2(SP) x DP2, ZeRO-1", stage=1, split=TP),
    Layout(name="TP2(SP) x DP2, ZeRO-2", stage=2, split=TP),
    Layout(name="PP2 interleaved x DP2, ZeRO-2", stage=2, split=VPP),
]
"""Layouts on which a step with a NaN on one rank is skipped."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A layout that is broken on purpose; `controls.BREAKS` says how."""

    name: str
    layout: Layout
    hit: str
    """Regular expression of the parameters whose first gradient must be far off."""
    spared: str = "$^"
    """Parameters whose first gradient must stay right."""


CONTROLS = [
    Control(
        name="no sum over the sequence",
        layout=Layout(name="TP2(SP) x DP2", split=TP),
        hit=r"^decoder\..*layernorm\.weight$",
        spared=r"^(tower|projector|embedding)|\.linear_",
    ),
    Control(
        name="tied embeddings not summed",
        layout=Layout(name="PP2 x DP2", split=PP),
        hit=r"^embedding\.weight$",
        spared=r"^(tower|projector|decoder)",
    ),
    Control(
        name="picture gradients not rescaled",
        layout=Layout(name="TP2(SP) x PP2", split=TPPP),
        hit=r"^(tower|projector)\.(?!.*k_proj\.bias)",
        spared=r"^(decoder|embedding)",
    ),
    Control(
        name="pictures of two rows exchanged",
        layout=Layout(name="TP2(SP) x DP2, rows of two", problem=UNPACKED, split=TP | ROWS_OF_TWO),
        hit=r"^(tower|projector)\.(?!.*k_proj\.bias)",
    ),
    Control(
        name="loss averaged in each micro-batch",
        layout=Layout(name="PP2 x DP2", split=PP),
        hit=r"^decoder\..*weight$",
    ),
    Control(
        name="gate and up exchanged in the reference",
        layout=Layout(name="TP2(SP) x PP2", split=TPPP),
        hit=r"^decoder\.layers\.1\.mlp\.linear_fc1\.weight$",
    ),
    Control(
        name="segment boundary one token late",
        layout=Layout(name="DP4", stage=2),
        hit=r"^decoder\.layers\.\d\.self_attention\.linear_qkv\.weight$",
    ),
    Control(
        name="norm without the vision engine",
        layout=Layout(name="DP4"),
        hit=r"$^",
        spared=r".",
    ),
    Control(
        name="batched exchange between two interleaved stages",
        layout=Layout(name="PP2 interleaved x DP2", split=VPP),
        hit=r"^decoder\.layers\.\d\.self_attention\.linear_qkv\.weight$",
    ),
]
