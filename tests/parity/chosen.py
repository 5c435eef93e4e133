"""What the quick tests take of the certificate's layouts, and those on which steps are skipped."""

from ghostvis_mega.perf.certify.cpu_layouts import few_cpu_layouts
from ghostvis_mega.perf.certify.faults import TP, VPP
from ghostvis_mega.perf.certify.layout import Layout

LAYOUTS = few_cpu_layouts(20)
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
