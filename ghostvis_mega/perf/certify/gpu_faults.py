"""Faults that two GPUs can show: BF16, Transformer Engine's layers; `breaking.BREAKS` says how.

Each is seen where it is over the bar that a right layout is held to. Needs no torch.
"""

from ghostvis_mega.perf.certify.faults import QKV, Fault
from ghostvis_mega.perf.certify.gpu_layouts import layout

WEIGHTS = r"^decoder\..*linear_(qkv|proj|fc1|fc2)\.weight$"
"""Large matrices: their own noise is about the joint one."""

GPU_FAULTS = [
    Fault(
        name="no sum over the sequence",
        layout=layout("TP2(SP)", 2),
        hit=r"^decoder\..*layernorm\.weight$",
        spared=r"\.linear_(qkv|proj|fc1|fc2)\.weight$",
    ),
    Fault(
        name="picture gradients not rescaled",
        layout=layout("TP2(SP)", 2),
        hit=r"^(tower|projector)\..*(fc[12]|linear_[12])\.weight$",
        spared=WEIGHTS,
    ),
    Fault(
        name="loss averaged in each replica",
        layout=layout("DP2, ZeRO-2"),
        hit=WEIGHTS,
    ),
    Fault(
        name="gate and up exchanged in all but the reference",
        layout=layout("DP2, ZeRO-2"),
        hit=r"$^",
        spared=WEIGHTS,
        shared=True,
    ),
    Fault(
        name="segment boundaries ignored",
        layout=layout("DP2, ZeRO-2"),
        hit=QKV,
    ),
    Fault(
        name="context rows shifted by one",
        layout=layout("CP2", context=2),
        hit=QKV,
    ),
    Fault(
        name="norm without the offloaded engine",
        layout=layout("DP2, ZeRO-2, LLM offloaded", offload=("llm",)),
        hit=r"$^",
        spared=WEIGHTS,
    ),
    Fault(
        name="one parameter group not updated",
        layout=layout("DP2, ZeRO-2"),
        hit=r"$^",
        spared=WEIGHTS,
        updates=True,
    ),
]
