"""Presets of the training benchmark: one command makes one table.

Text rows compare equal work: a sequence is one sample of random tokens, ours packs as many of them
into a micro-batch as a peer puts rows into its own. A step has 16 sequences of 4096 tokens for each
process, or as many tokens in longer ones. Rows with twice the tokens in a micro-batch may not fit
into the memory of a GPU.
"""

from collections.abc import Callable
from pathlib import Path

from ghostvis_mega.perf.train_bench.plans import PictureNeed, Plan, TextNeed
from ghostvis_mega.perf.train_bench.preset_parts import (
    DEEPSPEED,
    HF,
    LARGE_TOKENS,
    MICRO_TOKENS,
    NAIVE_LENGTH,
    NAIVE_ROWS,
    RECIPES,
    ROWS,
    SIZES,
    STEP_TOKENS,
    TEXT_TOKENS,
    UNFUSED,
    Size,
    base_settings,
    pack_settings,
    rows_of_one,
)
from ghostvis_mega.perf.train_bench.results import DATA_WAIT, TFLOPS
from ghostvis_mega.perf.train_bench.rows import ALTERNATIVES, OURS, Bar, Ratio, Row
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.hardware import has_cuda_device


def _text_need(size: Size, length: int, data: Path) -> TextNeed:
    return TextNeed(
        data / f"text-{length}-{size.vocab_size}.gvd",
        sample_length=length,
        vocab_size=size.vocab_size,
        samples=TEXT_TOKENS // length,
    )


def _ablation(size: Size, processes: int, length: int, data: Path) -> Plan:
    """Our text row with everything on, and with one thing changed at a time."""
    length = _fitting(length)
    need = _text_need(size, length, data)
    packs = STEP_TOKENS * processes // MICRO_TOKENS
    tensor = f"parallel.tensor={size.tensor}"
    everything = pack_settings(packs, MICRO_TOKENS, need.path, tensor)
    zero = {n: f"deepspeed.llm={DEEPSPEED / f'zero{n}.json'}" for n in (1, 3)}
    changed: dict[str, tuple[str, ...]] = {
        "without fused wgrad": ("train.fused_wgrad=false",),
        "without fused loss": ("train.fused_loss=false",),
        "without fused RoPE": ("train.fused_rope=false",),
        "MLPs run again": ("train.recompute=selective",),
        "layers run again": ("train.recompute=full",),
        "ZeRO-1": (zero[1],),
        "ZeRO-3": (zero[3],),
        **{f"FP8 {recipe}": (f"train.fp8={recipe}",) for recipe in RECIPES},
    }
    if size.tensor > 1:
        changed["without sequence parallelism"] = ("parallel.sequence_parallel=false",)
    rows = (Row(name, settings=(*everything, *more)) for name, more in changed.items())
    return Plan(
        settings=base_settings(size.text),
        rows=(Row("everything", settings=everything), *rows),
        ratios=tuple(Ratio(name, "everything") for name in changed),
        data=(need,),
    )


def _fitting(length: int) -> int:
    """The length of a text preset's sequences."""
    length = length or 4096
    if MICRO_TOKENS % length:
        raise ConfigError([f"--seq-length {length} does not divide {MICRO_TOKENS}. Use 4096."])
    return length


def _text(size: Size, processes: int, length: int, data: Path) -> Plan:
    """Our text rows beside all peers', each also with twice the tokens in a micro-batch."""
    length = _fitting(length)
    rows_each = MICRO_TOKENS // length
    count = STEP_TOKENS * processes // length
    need = _text_need(size, length, data)
    tensor = f"parallel.tensor={size.tensor}"
    ours, large = (
        pack_settings(STEP_TOKENS * processes // tokens, tokens, need.path, tensor)
        for tokens in (MICRO_TOKENS, LARGE_TOKENS)
    )
    megatron, megatron_large = (
        rows_of_one(count, length, rows, need.path, tensor) for rows in (rows_each, 2 * rows_each)
    )
    hf, hf_large = (
        rows_of_one(
            count,
            length,
            rows,
            need.path,
            f"deepspeed.llm={DEEPSPEED / size.zero}",
            f"train.recompute={size.recompute}",
        )
        for rows in (rows_each, 2 * rows_each)
    )
    fp8, fused_megatron = "train.fp8=delayed", "megatron+fused-wgrad"
    ours_whole, megatron_whole = _whole_rows(size, processes, length, need.path)
    hf_name = f"HF + DeepSpeed {size.zero.partition('.')[0]}"
    rows = (
        Row("ours", settings=ours),
        Row("ours 16k", settings=large, may_not_fit=True),
        Row("ours unfused", settings=(*ours, *UNFUSED)),
        Row("ours FP8", settings=(*ours, fp8)),
        Row("ours FP8 16k", settings=(*large, fp8), may_not_fit=True),
        *ours_whole,
        Row("Megatron-Core", "megatron", megatron),
        Row("Megatron-Core fused wgrad", fused_megatron, megatron),
        Row("Megatron-Core mbs x2", fused_megatron, megatron_large, may_not_fit=True),
        Row("Megatron-Core FP8", fused_megatron, (*megatron, fp8)),
        *megatron_whole,
        Row(hf_name, HF, hf),
        Row(f"{hf_name} mbs x2", HF, hf_large, may_not_fit=True),
    )
    return Plan(
        settings=base_settings(size.text),
        rows=rows,
        ratios=_text_ratios(rows, fp8_least=size.fp8),
        bars=(Bar(_joined(rows, ours=True, fp8=False), TFLOPS, least=size.tflops),),
        data=(need,),
    )


def _whole_rows(
    size: Size, processes: int, length: int, data: Path
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Our rows and Megatron-Core's with whole layers, of a size that is cut by tensor parallelism
    elsewhere: what large GPUs have the memory for."""
    if size.tensor == 1:
        return (), ()
    total, whole = STEP_TOKENS * processes, "parallel.tensor=1"
    ours, peers = [], []
    for name, tokens in {"TP 1": MICRO_TOKENS, "TP 1 mbs / 2": MICRO_TOKENS // 2}.items():
        if tokens % length:
            continue
        packs = pack_settings(total // tokens, tokens, data, whole)
        ours.append(Row(f"ours {name}", settings=packs, may_not_fit=True))
        fp8 = (*packs, "train.fp8=delayed")
        ours.append(Row(f"ours FP8 {name}", settings=fp8, may_not_fit=True))
        rows = rows_of_one(total // length, length, tokens // length, data, whole)
        peers.append(Row(f"Megatron-Core {name}", "megatron+fused-wgrad", rows, may_not_fit=True))
    return tuple(ours), tuple(peers)


def _joined(rows: tuple[Row, ...], *, ours: bool, fp8: bool) -> str:
    """Names of our rows or all peers', those in FP8 or those in BF16."""
    return ALTERNATIVES.join(
        row.name
        for row in rows
        if (row.kind == OURS) == ours
        and any(setting.startswith("train.fp8=") for setting in row.settings) == fp8
    )


def _text_ratios(rows: tuple[Row, ...], *, fp8_least: float) -> tuple[Ratio, ...]:
    """What is promised is the best of ours over the best of all peers, whoever that is."""
    ours, peers = (_joined(rows, ours=mine, fp8=False) for mine in (True, False))
    ours_fp8, peers_fp8 = (_joined(rows, ours=mine, fp8=True) for mine in (True, False))
    return (
        Ratio(ours, peers, 1.10, label="best of ours in BF16 / best of peers in BF16"),
        Ratio(ours_fp8, ours, fp8_least, label="best of ours in FP8 / best of ours in BF16"),
        Ratio(ours_fp8, peers_fp8, label="best of ours in FP8 / Megatron-Core FP8"),
        Ratio("ours unfused", "Megatron-Core"),
        Ratio("ours", "Megatron-Core fused wgrad"),
        Ratio("ours 16k", "Megatron-Core mbs x2"),
        *(
            Ratio(row.name, row.name.replace("ours", "Megatron-Core"))
            for row in rows
            if row.name.startswith("ours TP 1")
        ),
    )


def _vision(size: Size, processes: int, length: int, data: Path) -> Plan:
    """Our VLM beside our text model, transformers' and the naive baseline."""
    length = length or MICRO_TOKENS
    if length % 4096:
        raise ConfigError(
            [f"--seq-length {length}: the text row has samples of 4096. Use a multiple of that."]
        )
    text = _text_need(size, 4096, data)
    pictures = PictureNeed(data / "pictures.gvd")
    tensor = f"parallel.tensor={size.tensor}"
    packs = STEP_TOKENS * processes // length
    vlm = f"model.preset={size.vision}"
    hf, hf_large = (
        rows_of_one(
            ROWS * processes,
            NAIVE_LENGTH,
            micro,
            pictures.path,
            vlm,
            f"deepspeed.llm={DEEPSPEED / size.zero}",
            # Of ours, which the peer has not: the rules want a stage that pictures may miss.
            f"deepspeed.vision={DEEPSPEED / 'zero1.json'}",
            f"train.recompute={size.recompute}",
        )
        for micro in (16, 32)
    )
    naive = rows_of_one(NAIVE_ROWS * processes, NAIVE_LENGTH, 4, pictures.path, vlm)
    plain = pack_settings(packs, length, pictures.path, tensor, vlm, algorithm="balanced")
    # So that a rank encodes about as many pictures at a time in either size.
    seen, wider = ((*plain, f"tower.window={n * size.tensor}") for n in (1, 2))
    return Plan(
        settings=base_settings(size.text),
        rows=(
            Row("text", settings=pack_settings(packs, length, text.path, tensor)),
            Row("VLM", settings=seen),
            Row("VLM FP8", settings=(*seen, "train.fp8=delayed")),
            Row("VLM, wider windows", settings=wider, may_not_fit=True),
            Row("VLM, tower twice", settings=plain),
            Row("VLM, tower unfused", settings=(*seen, "tower.fused=false")),
            Row("HF VLM", HF, hf),
            Row("HF VLM mbs x2", HF, hf_large, may_not_fit=True),
            Row("naive VLM", "naive", naive),
        ),
        ratios=(
            Ratio("VLM | VLM, wider windows", "text", size.vision_ratio),
            Ratio("VLM", "text"),
            Ratio("VLM FP8", "VLM"),
            Ratio("VLM, tower twice", "VLM"),
            Ratio("VLM, tower unfused", "VLM"),
            Ratio("VLM", "HF VLM | HF VLM mbs x2"),
            Ratio("VLM", "naive VLM"),
        ),
        bars=(Bar("VLM", DATA_WAIT, most=0.5),),
        data=(text, pictures),
    )


def _align(size: Size, processes: int, length: int, data: Path) -> Plan:
    """Alignment (LLM and tower frozen) and, on more GPUs than one, SFT (all trained), each beside
    the naive baseline."""
    length = length or MICRO_TOKENS
    pictures = PictureNeed(data / "pictures.gvd")
    packs = STEP_TOKENS * processes // length
    frozen = "train.freeze=[llm,vision]"
    ours = pack_settings(packs, length, pictures.path, algorithm="balanced")
    naive = rows_of_one(NAIVE_ROWS * processes, NAIVE_LENGTH, 4, pictures.path)
    stages = {"align": (frozen,)}
    if processes >= size.tensor:
        stages["SFT"] = ()
    tensor = {"align": 1, "SFT": size.tensor}
    rows = []
    for stage, more in stages.items():
        degree = tensor[stage]
        layout = (f"parallel.tensor={degree}", f"tower.window={degree}")
        rows.append(Row(stage, settings=(*ours, *layout, *more)))
        # Everything trained in fp32 with plain AdamW is 16 bytes a parameter and more.
        fits = stage == "align"
        rows.append(Row(f"naive {stage}", "naive", (*naive, *more), may_not_fit=not fits))
    return Plan(
        settings=base_settings(size.vision),
        rows=tuple(rows),
        ratios=tuple(Ratio(stage, f"naive {stage}") for stage in stages),
        bars=tuple(Bar(stage, DATA_WAIT, most=0.5) for stage in stages),
        data=(pictures,),
    )


def _tiny(processes: int, length: int, data: Path) -> Plan:
    """Every kind of row at a size for a CPU: shows that all of it runs, not how fast anything
    is."""
    length = length or 128
    # So few kinds of tokens that three steps show whether a row learns.
    text = TextNeed(data / f"text-{length}-64.gvd", length, vocab_size=64, samples=512)
    pictures = PictureNeed(data / "pictures-60.gvd", pictures=60)
    count = 4 * processes
    no_vision = ("model.vision=null", "model.connector=null")
    ours = pack_settings(count // 2, 2 * length, text.path, *no_vision)
    peer = rows_of_one(count, length, 2, text.path, *no_vision)
    seen = pack_settings(2 * processes, 512, pictures.path, algorithm="balanced")
    one_each = rows_of_one(count, 512, 2, pictures.path)
    # Fused attention of packs knows no fp32, and CPUs no fast BF16.
    base = base_settings("vlm_tiny", precision="bf16" if has_cuda_device() else "fp32")
    base["model"]["llm"] = {"vocab_size": 1024}
    base["optim"]["lr"] = dict.fromkeys(("llm", "vision", "projector"), 1e-3)
    base["deepspeed"]["llm"] = str(DEEPSPEED / "zero1.json")
    return Plan(
        settings=base,
        rows=(
            Row("ours", settings=ours),
            Row("Megatron-Core", "megatron", peer),
            Row("HF + DeepSpeed zero1", "hf", peer),
            Row("naive", "naive", peer),
            Row("VLM", settings=seen),
            Row("HF VLM", "hf", one_each),
            Row("naive VLM", "naive", one_each),
        ),
        ratios=(
            Ratio("ours", "Megatron-Core"),
            Ratio("ours", "HF + DeepSpeed zero1"),
            Ratio("ours", "naive"),
            Ratio("VLM", "ours"),
            Ratio("VLM", "naive VLM"),
        ),
        data=(text, pictures),
    )


_KINDS: dict[str, tuple[Callable[[Size, int, int, Path], Plan], str]] = {
    "text-7b": (_text, "7b"),
    "text-1.5b": (_text, "1.5b"),
    "vlm-7b": (_vision, "7b"),
    "vlm-1.5b": (_vision, "1.5b"),
    "align-7b": (_align, "7b"),
    "align-1.5b": (_align, "1.5b"),
    "ablation-7b": (_ablation, "7b"),
    "ablation-1.5b": (_ablation, "1.5b"),
}
PRESETS = (*_KINDS, "tiny")


def preset_plan(name: str, *, processes: int, seq_length: int, data: Path) -> Plan:
    """The rows of a preset for so many processes.

    Args:
        name: One of `PRESETS`.
        processes: Ranks of each row.
        seq_length: Of a sequence; 0: the preset's own.
        data: Folder for its datasets.

    Raises:
        ConfigError: There is no such preset, or not for this many processes.
    """
    if name == "tiny":
        return _tiny(processes, seq_length, data)
    if name not in _KINDS:
        raise ConfigError([f"--preset {name} is unknown. Use {', '.join(PRESETS)}."])
    make, size = _KINDS[name]
    allowed = SIZES[size].processes
    if make is _align:
        allowed = tuple(sorted({1, *allowed}))
    if processes not in allowed:
        fitting = " or ".join(map(str, allowed))
        raise ConfigError(
            [f"--preset {name} is for {fitting} processes, not {processes}: name another number."]
        )
    return make(SIZES[size], processes, seq_length, data)
