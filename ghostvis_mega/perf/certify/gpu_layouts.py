"""The layouts of the GPU set: BF16 with Transformer Engine's layers, on two and on four GPUs.

Needs no torch, so that they can be listed at once.
"""

from typing import Any

from ghostvis_mega.perf.certify.layout import Layout, Sections, merge, parallel

BASE: Sections = {
    "model": {
        "llm": {
            "num_layers": 8,
            "hidden_size": 1024,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 128,
            "ffn_hidden_size": 2816,
            "vocab_size": 32768,
            "max_positions": 2048,
            "init_std": 0.02,
        },
        "vision": {
            "num_layers": 4,
            "hidden_size": 512,
            "num_heads": 8,
            "ffn_hidden_size": 1536,
            "image_size": 224,
            "patch_size": 14,
            "init_std": 0.02,
        },
        "connector": {"tokens_per_image": 64, "init_std": 0.02, "num_heads": 8},
    },
    "data": {"seq_length": 1024},
    "train": {"precision": "bf16"},
}
"""Shapes that Transformer Engine's kernels are made for."""

UNPACKED: Sections = {"data": {"packing": False}}
ROWS_OF_TWO: Sections = {"batch": {"micro_size": 2}}
UNTIED: Sections = {"model": {"llm": {"tied_embeddings": False}}}
PERCEIVER: Sections = {
    "model": {
        "vision": {"kind": "clip", "feature_layer": -2},
        "connector": {"kind": "perceiver_mlp"},
    }
}
DROPOUT: Sections = {"model": {"llm": {"hidden_dropout": 0.1}}}
FULL: Sections = {"train": {"recompute": "full"}}
SELECTIVE: Sections = {"train": {"recompute": "selective"}}
WINDOWS: Sections = {"tower": {"window": 1}}
KEPT: Sections = {"tower": {"backward": "keep", "images_per_forward": 2}}


def freeze(*modules: str) -> Sections:
    """Parts that are not trained."""
    return {"train": {"freeze": list(modules)}}


def layout(
    name: str,
    *degrees: int,
    ranks: int = 2,
    problem: Sections | None = None,
    split: Sections | None = None,
    sequence_parallel: bool = True,
    context: int = 1,
    **fields: Any,
) -> Layout:
    """A layout, with ZeRO-2 unless `fields` say otherwise.

    Args:
        name: As the table shows it.
        degrees: Tensor, pipeline, virtual pipeline.
        ranks: GPUs.
        problem: What else defines the problem, over `BASE`.
        split: How else it is computed.
        sequence_parallel: Of tensor parallelism.
        context: Context-parallel degree.
        fields: Of `Layout`.
    """
    degrees_of_grid = parallel(*degrees, sequence_parallel=sequence_parallel, context=context)
    return Layout(
        name=name,
        ranks=ranks,
        problem=merge(BASE, problem or {}),
        split=merge({"parallel": degrees_of_grid}, split or {}),
        align=2 * context if context > 1 else 1,
        **({"stage": 2} | fields),
    )


LAYOUTS = (
    layout("DP2, ZeRO-2"),
    layout("DP2, ZeRO-1", stage=1),
    layout("DP2, ZeRO-3", stage=3),
    layout("DP2, ZeRO-2 offloaded", offload=("llm", "vision")),
    layout("DP2, ZeRO-2, graphs kept, two by two", split=KEPT),
    layout("DP2, ZeRO-2, in windows", split=WINDOWS),
    layout("DP2, ZeRO-3, full recompute, untied", stage=3, problem=UNTIED, split=FULL),
    layout("DP2, ZeRO-2, rows of two", problem=UNPACKED, split=ROWS_OF_TWO),
    layout("TP2(SP)", 2),
    layout("TP2", 2, sequence_parallel=False),
    layout("TP2(SP), selective recompute", 2, split=SELECTIVE),
    layout("TP2(SP), perceiver on CLIP, untied", 2, problem=merge(PERCEIVER, UNTIED)),
    layout("TP2(SP), unpacked", 2, problem=UNPACKED),
    layout("TP2(SP), in windows", 2, split=WINDOWS),
    layout("TP2(SP), projector alone", 2, problem=freeze("llm", "vision")),
    layout("PP2", 1, 2),
    layout("PP2 interleaved", 1, 2, 2),
    layout("PP2, full recompute", 1, 2, split=FULL),
    layout("PP2, one picture", 1, 2, kind="one"),
    layout("PP2, frozen LLM", 1, 2, problem=freeze("llm")),
    layout("PP2 interleaved, all text", 1, 2, 2, kind="text"),
    layout("PP2, 3 + 5 layers", 1, 2, split={"parallel": {"first_stage_layers": 3}}),
    layout("CP2", context=2),
    layout("CP2, unpacked", context=2, problem=UNPACKED),
    layout("CP2, ZeRO-3, full recompute", context=2, stage=3, split=FULL),
    layout("TP2(SP), dropout", 2, problem=DROPOUT),
    layout("DP4, ZeRO-2", ranks=4),
    layout("TP2(SP) x DP2, ZeRO-1", 2, ranks=4, stage=1),
    layout("DP4, ZeRO-3", ranks=4, stage=3),
    layout("TP4(SP)", 4, ranks=4),
    layout("TP2(SP) x DP2", 2, ranks=4),
    layout("TP2(SP) x PP2", 2, 2, ranks=4),
    layout("TP2(SP) x PP2 interleaved, untied", 2, 2, 2, ranks=4, problem=UNTIED),
    layout("TP2(SP) x PP2, full recompute, graphs kept", 2, 2, ranks=4, split=merge(FULL, KEPT)),
    layout("PP4", 1, 4, ranks=4),
    layout("PP4 interleaved", 1, 4, 2, ranks=4),
    layout("PP2 x DP2, one picture", 1, 2, ranks=4, kind="one"),
    layout("TP2(SP) x CP2", 2, ranks=4, context=2),
    layout("PP2 x CP2", 1, 2, ranks=4, context=2),
    layout("PP2 interleaved x CP2, one picture", 1, 2, 2, ranks=4, context=2, kind="one"),
    layout("CP2 x DP2, ZeRO-3", ranks=4, context=2, stage=3),
    layout("CP4", ranks=4, context=4),
)
