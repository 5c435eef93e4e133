"""What the quick tests take of the certificate's layouts, and those on which steps are skipped."""

from dataclasses import replace

from ghostvis_mega.perf.certify.cpu_layouts import few_cpu_layouts
from ghostvis_mega.perf.certify.faults import CP, TP, VPP
from ghostvis_mega.perf.certify.gpu_faults import GPU_FAULTS
from ghostvis_mega.perf.certify.layout import Layout, Sections, parallel


def deep(num_layers: int) -> Sections:
    """The problem with more layers, for more stages."""
    return {"model": {"llm": {"num_layers": num_layers}}}


STAGES = [
    Layout(
        name="PP2 interleaved x DP2, 4 + 2 layers",
        problem=deep(6),
        split={"parallel": parallel(1, 2, 2, first_stage_layers=4, last_stage_layers=2)},
    ),
    Layout(
        name="PP4, 1 + 3 + 3 + 1 layers, offloaded",
        offload=("llm", "vision"),
        problem=deep(8),
        split={"parallel": parallel(1, 4, first_stage_layers=1, last_stage_layers=1)},
    ),
]
"""Pipelines of other stages than the covering design has."""

CONTEXT = [
    Layout(name="CP2 x DP2, one picture on two ranks", kind="one", align=4, split=CP),
    Layout(
        name="CP2 x DP2, one picture on one rank, frozen LLM",
        kind="one",
        problem={"data": {"packing": False}, "train": {"freeze": ["llm"]}},
        split=CP,
    ),
]
"""One picture cut over two ranks, and whole on one."""

LAYOUTS = [*few_cpu_layouts(20), *STAGES, *CONTEXT]
HOST = ("llm", "vision")

SKIPS = [
    Layout(name="DP4, ZeRO-3", stage=3),
    Layout(name="TP2(SP) x DP2, ZeRO-0", stage=0, split=TP),
    Layout(name="TP2(SP) x DP2, ZeRO-1", stage=1, split=TP),
    Layout(name="TP2(SP) x DP2, ZeRO-2", stage=2, split=TP),
    Layout(name="PP2 interleaved x DP2, ZeRO-2", stage=2, split=VPP),
    Layout(name="TP2(SP) x DP2, ZeRO-1, offloaded", offload=HOST, split=TP),
    Layout(name="DP4, ZeRO-3, offloaded", stage=3, offload=HOST),
]
"""Layouts on which a step with a NaN on one rank is skipped."""

KEPT = ["TP2(SP) x DP2, ZeRO-1, offloaded"]
"""Those on which traces of a skipped step are kept on purpose."""

ROUNDED = [
    Layout(
        name=f"{name}, BF16",
        stage=2,
        problem={"train": {"precision": "bf16"}},
        split={"parallel": degrees},
    )
    for name, degrees in (
        ("TP2(SP) x DP2", parallel(2)),
        ("PP2 interleaved x DP2", parallel(1, 2, 2)),
    )
]
"""Layouts whose bar is the noise of one process that computes in BF16 as well."""

ROUNDED_FAULTS = [
    replace(
        fault,
        layout=replace(fault.layout, ranks=4, problem={"train": {"precision": "bf16"}}),
    )
    for fault in GPU_FAULTS
]
"""Those of the GPU set in the small problem, on twice as many replicas."""
