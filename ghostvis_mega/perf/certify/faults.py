"""Faults that are planted to see whether the comparison finds them.

Needs no torch, so that they can be listed at once.
"""

import re
from dataclasses import dataclass
from typing import Any

from ghostvis_mega.perf.certify.bars import (
    GRADIENT_BAR,
    NOISE_FACTOR,
    NORM_BAR,
    WEIGHT_BAR,
    noise_bars,
)
from ghostvis_mega.perf.certify.layout import Layout, Sections, parallel
from ghostvis_mega.utils.worst import worst

TP: Sections = {"parallel": parallel(2)}
PP: Sections = {"parallel": parallel(1, 2)}
CP: Sections = {"parallel": parallel(context=2)}
VPP: Sections = {"parallel": parallel(1, 2, 2)}
TPPP: Sections = {"parallel": parallel(2, 2)}
ROWS_OF_TWO: Sections = {"batch": {"micro_size": 2}}
QKV = r"^decoder\.layers\.\d\.self_attention\.linear_qkv\.weight$"
UNPACKED: Sections = {"data": {"packing": False}}
SMALL_STEPS: Sections = {
    "model": {"llm": {"qkv_bias": False}},
    "optim": {"lr": dict.fromkeys(("llm", "vision", "resampler", "projector"), 2e-6)},
}
"""Norms start at 1, and three such steps change less of them than the bar of a weight grants."""
DROPOUT: Sections = {"model": {"llm": {"hidden_dropout": 0.1}}}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A layout that is broken on purpose; `breaking.BREAKS` says how."""

    name: str
    layout: Layout
    hit: str
    """Regular expression of the parameters whose first gradient must be far off."""
    spared: str = "$^"
    """Parameters whose first gradient must stay right."""
    updates: bool = False
    """Nothing shows it but the distance of the weights in units of their change."""
    shared: bool = False
    """One process has it as well: nothing shows it but the size of what would be its noise."""


FAR = 1e-2
"""What the first gradient of a hit parameter must exceed."""
UNMOVED = 0.5
"""What the error of an update must exceed; that of a weight which never moves is 1."""


@dataclass(frozen=True)
class Finding:
    """What a report says of a planted fault."""

    where: str
    """The parameter that moved most of those that the fault should move."""
    value: float
    unit: str
    bar: float
    """What `value` had to exceed."""
    seen: bool
    """Every parameter that should be wrong is far off, every one that should be right is right."""


def finding(fault: Fault, row: dict[str, Any]) -> Finding:
    """Judge the measurement of a broken layout.

    Args:
        fault: What was planted.
        row: Of `lab.Lab.measure`.
    """
    if row.get("noise") is not None:
        return _finding_beside_noise(fault, row)
    hit, spared = _hit_and_spared(fault, row["gradients"])
    kept = all(error <= GRADIENT_BAR for error in spared.values())
    if fault.updates:
        value = row["update_error"]
        seen = kept and value > UNMOVED
        return Finding(f"update, {row['update_name']}", value, "relative L2", UNMOVED, seen)
    if not hit:
        # The first gradient is right, and what is done with it is not.
        value, bar = row["weight_error"], 10 * WEIGHT_BAR
        seen = kept and value > bar and row["norm_error"] > 10 * NORM_BAR
        return Finding(f"weight, {row['weight_name']}", value, "relative L2", bar, seen)
    name, value = worst(hit.items())
    far = all(error > FAR for error in hit.values())
    return Finding(f"gradient, {name}", value, "relative L2", FAR, kept and far)


def _finding_beside_noise(fault: Fault, row: dict[str, Any]) -> Finding:
    """In BF16: what is seen is over the bar that a right layout is held to."""
    hit, spared = _hit_and_spared(fault, row["ratios"])
    kept = all(ratio <= NOISE_FACTOR for ratio in spared.values())
    bars = noise_bars(row["noise"])
    if fault.shared:
        value, bar = row["noise"]["gradient_error"], row["noise_caps"]["gradient_error"]
        where = f"one BF16 process, worst gradient, {row['noise_name']}"
        return Finding(where, value, "relative", bar, kept and value > bar)
    if fault.updates:
        value, bar = row["update_ratio"], bars["update_ratio"]
        where = f"update over its noise, {row['update_ratio_name']}"
        return Finding(where, value, "times", bar, kept and value > bar)
    if not hit:
        value, bar = row["norm_error"], bars["norm_error"]
        return Finding("joint norm", value, "relative", bar, kept and value > bar)
    name, value = worst(hit.items())
    far = all(ratio > NOISE_FACTOR for ratio in hit.values())
    return Finding(f"gradient over its noise, {name}", value, "times", NOISE_FACTOR, kept and far)


def _hit_and_spared(
    fault: Fault, figures: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    hit = {name: value for name, value in figures.items() if re.search(fault.hit, name)}
    spared = {name: value for name, value in figures.items() if re.search(fault.spared, name)}
    return hit, spared


FAULTS = [
    Fault(
        name="no sum over the sequence",
        layout=Layout(name="TP2(SP) x DP2", split=TP),
        hit=r"^decoder\..*layernorm\.weight$",
        spared=r"^(tower|projector|embedding)|\.linear_",
    ),
    Fault(
        name="tied embeddings not summed",
        layout=Layout(name="PP2 x DP2", split=PP),
        hit=r"^embedding\.weight$",
        spared=r"^(tower|projector|decoder)",
    ),
    Fault(
        name="picture gradients not rescaled",
        layout=Layout(name="TP2(SP) x PP2", split=TPPP),
        hit=r"^(tower|projector)\.(?!.*k_proj\.bias)",
        spared=r"^(decoder|embedding)",
    ),
    Fault(
        name="windows of pictures scaled as a step",
        # Windows of three and of one: were they alike, all gradients would grow by the same factor,
        # which AdamW's steps do not show.
        layout=Layout(name="TP2(SP) x DP2, in windows", split=TP | {"tower": {"window": 3}}),
        hit=r"^(tower|projector|decoder)\.(?!.*(k_proj\.bias))",
    ),
    Fault(
        name="pictures of two rows exchanged",
        layout=Layout(name="TP2(SP) x DP2, rows of two", problem=UNPACKED, split=TP | ROWS_OF_TWO),
        hit=r"^(tower|projector)\.(?!.*k_proj\.bias)",
    ),
    Fault(
        name="loss averaged in each micro-batch",
        layout=Layout(name="PP2 x DP2", split=PP),
        hit=r"^decoder\..*weight$",
    ),
    Fault(
        name="loss averaged in each replica",
        layout=Layout(name="TP2(SP) x DP2, ZeRO-2", stage=2, split=TP),
        hit=r"^decoder\..*weight$",
    ),
    Fault(
        name="gate and up exchanged in the reference",
        layout=Layout(name="TP2(SP) x PP2", split=TPPP),
        hit=r"^decoder\.layers\.1\.mlp\.linear_fc1\.weight$",
    ),
    Fault(
        name="segment boundary one token late",
        layout=Layout(name="DP4", stage=2),
        hit=QKV,
    ),
    Fault(name="segment boundaries ignored", layout=Layout(name="DP4"), hit=QKV),
    Fault(
        name="RoPE restarted one token late in a pack",
        layout=Layout(name="TP2(SP) x DP2", split=TP),
        hit=QKV,
    ),
    Fault(
        name="RoPE of the keys not restarted in a pack",
        layout=Layout(name="PP2 x DP2", split=PP),
        hit=QKV,
    ),
    Fault(
        name="norm without the vision engine",
        layout=Layout(name="DP4"),
        hit=r"$^",
        spared=r".",
    ),
    Fault(
        name="norm without the offloaded engine",
        layout=Layout(name="TP2(SP) x DP2, LLM offloaded", offload=("llm",), split=TP),
        hit=r"$^",
        spared=r".",
    ),
    Fault(
        name="batched exchange between two interleaved stages",
        layout=Layout(name="PP2 interleaved x DP2", split=VPP),
        hit=QKV,
    ),
    Fault(
        name="dropout seed shared across tensor ranks",
        layout=Layout(name="TP2(SP) x DP2, dropout", problem=DROPOUT, split=TP),
        hit=r"^decoder\..*weight$",
    ),
    Fault(
        name="context rows shifted by one",
        layout=Layout(name="CP2 x DP2", align=4, split=CP),
        hit=r"^(decoder\.layers\.\d\.self_attention\.linear_qkv\.weight|embedding\.weight)$",
    ),
    Fault(
        name="gradients of fetched keys and values not summed",
        layout=Layout(name="CP2 x DP2", align=4, split=CP),
        hit=QKV,
        spared=r"^decoder\.(layers\.3\.(self_attention\.linear_proj|mlp)|final)",
    ),
    Fault(
        name="a picture's rows given to the wrong context rank",
        layout=Layout(name="CP2 x DP2", kind="one", align=4, split=CP),
        hit=r"^(tower|projector)\.(?!.*k_proj\.bias)",
    ),
    Fault(
        name="one parameter group not updated",
        layout=Layout(name="DP4, no bias, small steps", stage=2, problem=SMALL_STEPS),
        hit=r"$^",
        spared=r".",
        updates=True,
    ),
]
