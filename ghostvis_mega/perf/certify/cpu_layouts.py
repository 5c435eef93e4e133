"""The layouts of the CPU set.

Needs no torch, so that they can be listed at once.
"""

from ghostvis_mega.perf.certify.layout import Layout, Sections, parallel

TP = {"parallel": parallel(2)}
PP = {"parallel": parallel(1, 2)}
VPP = {"parallel": parallel(1, 2, 2)}
TPPP = {"parallel": parallel(2, 2)}
ROWS_OF_TWO = {"batch": {"micro_size": 2}}
CP = {"parallel": parallel(context=2)}
CP4 = {"parallel": parallel(context=4)}
TPCP = {"parallel": parallel(2, context=2)}
PPCP = {"parallel": parallel(1, 2, context=2)}
VPPCP = {"parallel": parallel(1, 2, 2, context=2)}
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
HOST = ("llm", "vision")
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
    Layout(name="DP4, ZeRO-1, offloaded", offload=HOST),
    Layout(name="DP4, ZeRO-2, vision ZeRO-1 offloaded", stage=2, vision_stage=1, offload=HOST[1:]),
    Layout(
        name="DP4, ZeRO-3 offloaded, full recompute",
        stage=3,
        offload=HOST[:1],
        split={"train": {"recompute": "full"}},
    ),
    Layout(name="TP2(SP) x DP2, ZeRO-2, offloaded", stage=2, offload=HOST, split=TP),
    Layout(name="TP2(SP) x DP2, ZeRO-3, offloaded", stage=3, offload=HOST, split=TP),
    Layout(name="TP2(SP) x PP2, ZeRO-1, LLM offloaded", offload=HOST[:1], split=TPPP),
    Layout(
        name="PP2 interleaved x DP2, ZeRO-2 offloaded, vision ZeRO-0",
        stage=2,
        vision_stage=0,
        offload=HOST[:1],
        split=VPP,
    ),
    Layout(
        name="PP2 x DP2, ZeRO-2, one picture, offloaded",
        stage=2,
        kind="one",
        offload=HOST,
        split=PP,
    ),
    Layout(name="PP2 x DP2, frozen LLM, offloaded", problem=ALIGN, offload=HOST, split=PP),
    Layout(name="CP2 x DP2, ZeRO-0", stage=0, align=4, split=CP),
    Layout(name="CP2 x DP2, ZeRO-1", align=4, split=CP),
    Layout(name="CP2 x DP2, ZeRO-2", stage=2, align=4, split=CP),
    Layout(name="CP2 x DP2, ZeRO-3", stage=3, align=4, split=CP),
    Layout(name="CP2 x DP2, rows of two", problem=UNPACKED, split=CP | ROWS_OF_TWO),
    Layout(name="CP2 x DP2, frozen LLM", align=4, problem=ALIGN, split=CP),
    Layout(name="CP2 x DP2, one picture on two ranks", kind="one", align=4, split=CP),
    Layout(name="CP2 x DP2, one picture on one rank", kind="one", problem=UNPACKED, split=CP),
    Layout(
        name="CP2 x DP2, one picture on one rank, frozen LLM",
        kind="one",
        problem=ALIGN | UNPACKED,
        split=CP,
    ),
    Layout(
        name="CP2 x DP2, all text, frozen vision",
        kind="text",
        align=4,
        problem=FROZEN_VISION,
        split=CP,
    ),
    Layout(name="CP4, ZeRO-1", align=8, split=CP4),
    Layout(name="CP4, ZeRO-2, unpacked", stage=2, problem=UNPACKED, split=CP4),
    Layout(name="TP2(SP) x CP2, ZeRO-1", align=4, split=TPCP),
    Layout(
        name="TP2(SP) x CP2, ZeRO-2, rows of two",
        stage=2,
        problem=UNPACKED,
        split=TPCP | ROWS_OF_TWO,
    ),
    Layout(
        name="TP2(SP) x CP2, full recompute",
        align=4,
        split=TPCP | {"train": {"recompute": "full"}},
    ),
    Layout(
        name="TP2(SP) x CP2, selective recompute",
        align=4,
        split=TPCP | {"train": {"recompute": "selective"}},
    ),
    Layout(name="PP2 x CP2, ZeRO-1", align=4, split=PPCP),
    Layout(
        name="PP2 x CP2, ZeRO-2, one picture, frozen LLM",
        stage=2,
        kind="one",
        align=4,
        problem=ALIGN,
        split=PPCP,
    ),
    Layout(name="PP2 interleaved x CP2, ZeRO-1", align=4, split=VPPCP),
    Layout(
        name="PP2 interleaved x CP2, ZeRO-2, projector alone, rows of two",
        stage=2,
        problem=PROJECTOR_ONLY | UNPACKED,
        split=VPPCP | ROWS_OF_TWO,
    ),
]
