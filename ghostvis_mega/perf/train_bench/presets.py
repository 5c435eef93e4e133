"""Presets of the training benchmark: one command makes one table.

Text rows compare equal work: a sequence is one sample of random tokens, ours packs as many of them
into a micro-batch as a peer puts rows into its own. A step has 16 sequences of 4096 tokens for each
process, or as many tokens in longer ones.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_mega.perf.train_bench.plans import PictureNeed, Plan, TextNeed
from ghostvis_mega.perf.train_bench.results import DATA_WAIT, TFLOPS
from ghostvis_mega.perf.train_bench.rows import Bar, Ratio, Row
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.hardware import has_cuda_device
from ghostvis_mega.utils.launch import PACKAGES

_DEEPSPEED = PACKAGES / "ds_configs"
_MICRO_TOKENS = 8192
"""Of one micro-batch, ours and peers'."""
_STEP_TOKENS = 16 * 4096
"""Of one step, for each process."""
_TEXT_TOKENS = 8_000_000
_RECIPES = ("delayed", "tensorwise", "blockwise")
_FUSED = "train.fused_wgrad=true"
_ROWS, _NAIVE_ROWS = 192, 32
"""Samples with pictures of a step, for each process: about as many tokens as ours; the naive
baseline would take minutes for those, and loses little by its more frequent updates."""
_NAIVE_LENGTH = 2048
"""Longest row of the naive baseline; each micro-batch is padded to its own longest."""


@dataclass(frozen=True)
class _Size:
    """One model size."""

    text: str
    vision: str
    tensor: int
    """Of our and Megatron-Core's rows."""
    processes: tuple[int, ...]
    vocab_size: int
    tflops: float
    """Promised, of text in BF16."""
    fp8: float
    """Promised speed of FP8 over BF16."""
    vision_ratio: float
    """Promised efficiency with pictures over that of text."""
    zero: str
    """DeepSpeed file of the transformers peer."""
    recompute: str
    """Of the transformers peer."""


_SIZES = {
    "7b": _Size("qwen25_7b", "vlm_7b", 2, (2, 4), 152_064, 528, 1.35, 0.95, "zero3.json", "full"),
    "1.5b": _Size(
        "qwen25_1_5b", "vlm_1_5b", 1, (1, 2, 4), 151_936, 400, 1.0, 0.90, "zero1.json", "none"
    ),
}


def _base(model: str, *, precision: str = "bf16") -> dict[str, Any]:
    return {
        "model": {"preset": model},
        "data": {"train": "unset", "seq_length": _MICRO_TOKENS, "num_workers": 2},
        "batch": {"global_size": 1},
        "optim": {"schedule": "constant"},
        "deepspeed": {"llm": str(_DEEPSPEED / "zero2.json")},
        "train": {"steps": 1, "precision": precision},
        "log": {"output": "unset"},
    }


def _packs(count: int, length: int, data: Path, *more: str, algorithm: str = "bfd") -> tuple:
    """Settings of a row of ours."""
    return (
        f"data.train={data}",
        f"data.seq_length={length}",
        f"data.pack_algorithm={algorithm}",
        f"batch.global_size={count}",
        *more,
    )


def _rows(count: int, length: int, micro: int, data: Path, *more: str) -> tuple:
    """Settings of a peer's row: one sample each."""
    return (
        f"data.train={data}",
        "data.packing=false",
        f"data.seq_length={length}",
        f"batch.global_size={count}",
        f"batch.micro_size={micro}",
        *more,
    )


def _hf() -> str:
    return "hf+liger" if importlib.util.find_spec("liger_kernel") else "hf"


def _text_need(size: _Size, length: int, data: Path) -> TextNeed:
    return TextNeed(
        data / f"text-{length}-{size.vocab_size}.gvd",
        sample_length=length,
        vocab_size=size.vocab_size,
        samples=_TEXT_TOKENS // length,
    )


def _ablation(size: _Size, processes: int, length: int, data: Path) -> Plan:
    """Our text row with everything on, and with one thing changed at a time."""
    length = _fitting(length)
    need = _text_need(size, length, data)
    packs = _STEP_TOKENS * processes // _MICRO_TOKENS
    tensor = f"parallel.tensor={size.tensor}"
    everything = _packs(packs, _MICRO_TOKENS, need.path, tensor, _FUSED)
    zero = {n: f"deepspeed.llm={_DEEPSPEED / f'zero{n}.json'}" for n in (1, 3)}
    changed: dict[str, tuple[str, ...]] = {
        "without fused wgrad": ("train.fused_wgrad=false",),
        "without fused loss": ("train.fused_loss=false",),
        "MLPs run again": ("train.recompute=selective",),
        "layers run again": ("train.recompute=full",),
        "ZeRO-1": (zero[1],),
        "ZeRO-3": (zero[3], "train.fused_wgrad=false"),
        **{f"FP8 {recipe}": (f"train.fp8={recipe}",) for recipe in _RECIPES},
    }
    if size.tensor > 1:
        changed["without sequence parallelism"] = ("parallel.sequence_parallel=false",)
    rows = (Row(name, settings=(*everything, *more)) for name, more in changed.items())
    return Plan(
        settings=_base(size.text),
        rows=(Row("everything", settings=everything), *rows),
        ratios=tuple(Ratio(name, "everything") for name in changed),
        data=(need,),
    )


def _fitting(length: int) -> int:
    """The length of a text preset's sequences."""
    length = length or 4096
    if _MICRO_TOKENS % length:
        raise ConfigError([f"--seq-length {length} does not divide {_MICRO_TOKENS}. Use 4096."])
    return length


def _text(size: _Size, processes: int, length: int, data: Path) -> Plan:
    """Our text rows beside all peers'."""
    length = _fitting(length)
    rows_each = _MICRO_TOKENS // length
    count = _STEP_TOKENS * processes // length
    need = _text_need(size, length, data)
    tensor = f"parallel.tensor={size.tensor}"
    ours = _packs(count // rows_each, _MICRO_TOKENS, need.path, tensor)
    megatron = _rows(count, length, rows_each, need.path, tensor)
    hf = _rows(
        count,
        length,
        2 * rows_each,
        need.path,
        f"deepspeed.llm={_DEEPSPEED / size.zero}",
        f"train.recompute={size.recompute}",
    )
    hf_name = f"HF + DeepSpeed {size.zero.partition('.')[0]}"
    rows = (
        Row("ours", settings=ours),
        Row("ours fused wgrad", settings=(*ours, _FUSED)),
        Row("ours FP8", settings=(*ours, _FUSED, "train.fp8=delayed")),
        Row("Megatron-Core", "megatron", megatron),
        Row("Megatron-Core fused wgrad", "megatron+fused-wgrad", megatron),
        Row(hf_name, _hf(), hf),
    )
    peers = ("Megatron-Core", "Megatron-Core fused wgrad", hf_name)
    return Plan(
        settings=_base(size.text),
        rows=rows,
        ratios=(
            *(Ratio("ours", peer) for peer in peers),
            *(Ratio("ours fused wgrad", peer, 1.10) for peer in peers),
            Ratio("ours FP8", "ours fused wgrad", size.fp8),
        ),
        bars=(Bar("ours fused wgrad", TFLOPS, least=size.tflops),),
        data=(need,),
    )


def _vision(size: _Size, processes: int, length: int, data: Path) -> Plan:
    """Our VLM beside our text model, transformers' and the naive baseline."""
    length = length or _MICRO_TOKENS
    text = _text_need(size, 4096, data)
    pictures = PictureNeed(data / "pictures.gvd")
    tensor = f"parallel.tensor={size.tensor}"
    packs = _STEP_TOKENS * processes // length
    vlm = f"model.preset={size.vision}"
    hf = _rows(
        _ROWS * processes,
        _NAIVE_LENGTH,
        16,
        pictures.path,
        vlm,
        f"deepspeed.llm={_DEEPSPEED / size.zero}",
        # Of ours, which the peer has not: the rules want a stage that pictures may miss.
        f"deepspeed.vision={_DEEPSPEED / 'zero1.json'}",
        f"train.recompute={size.recompute}",
    )
    naive = _rows(_NAIVE_ROWS * processes, _NAIVE_LENGTH, 4, pictures.path, vlm)
    seen = _packs(packs, length, pictures.path, tensor, vlm, algorithm="balanced")
    return Plan(
        settings=_base(size.text),
        rows=(
            Row("text", settings=_packs(packs, length, text.path, tensor)),
            Row("VLM", settings=seen),
            Row("VLM FP8", settings=(*seen, "train.fp8=delayed")),
            Row("HF VLM", _hf(), hf),
            Row("naive VLM", "naive", naive),
        ),
        ratios=(
            Ratio("VLM", "text", size.vision_ratio),
            Ratio("VLM FP8", "VLM"),
            Ratio("VLM", "HF VLM"),
            Ratio("VLM", "naive VLM"),
        ),
        bars=(Bar("VLM", DATA_WAIT, most=0.5),),
        data=(text, pictures),
    )


def _align(size: _Size, processes: int, length: int, data: Path) -> Plan:
    """Alignment (LLM and tower frozen) and SFT (all trained), each beside the naive baseline; on one
    GPU alignment alone fits."""
    length = length or _MICRO_TOKENS
    pictures = PictureNeed(data / "pictures.gvd")
    packs = _STEP_TOKENS * processes // length
    frozen = "train.freeze=[llm,vision]"
    ours = _packs(packs, length, pictures.path, algorithm="balanced")
    naive = _rows(_NAIVE_ROWS * processes, _NAIVE_LENGTH, 4, pictures.path)
    stages = {"align": (frozen,)}
    if processes >= size.tensor:
        stages["SFT"] = ()
    tensor = {"align": 1, "SFT": size.tensor}
    rows = []
    for stage, more in stages.items():
        layout = f"parallel.tensor={tensor[stage]}"
        rows.append(Row(stage, settings=(*ours, layout, *more)))
        rows.append(Row(f"naive {stage}", "naive", (*naive, *more)))
    return Plan(
        settings=_base(size.vision),
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
    ours = _packs(count // 2, 2 * length, text.path, *no_vision)
    peer = _rows(count, length, 2, text.path, *no_vision)
    seen = _packs(2 * processes, 512, pictures.path, algorithm="balanced")
    one_each = _rows(count, 512, 2, pictures.path)
    # Fused attention of packs knows no fp32, and CPUs no fast BF16.
    base = _base("vlm_tiny", precision="bf16" if has_cuda_device() else "fp32")
    base["model"]["llm"] = {"vocab_size": 1024}
    base["optim"]["lr"] = dict.fromkeys(("llm", "vision", "projector"), 1e-3)
    base["deepspeed"]["llm"] = str(_DEEPSPEED / "zero1.json")
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


_KINDS: dict[str, tuple[Callable[[_Size, int, int, Path], Plan], str]] = {
    "text-7b": (_text, "7b"),
    "text-1.5b": (_text, "1.5b"),
    "vlm-7b": (_vision, "7b"),
    "vlm-1.5b": (_vision, "1.5b"),
    "align-7b": (_align, "7b"),
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
    allowed = (1, *_SIZES[size].processes) if make is _align else _SIZES[size].processes
    if processes not in allowed:
        fitting = " or ".join(map(str, allowed))
        raise ConfigError(
            [f"--preset {name} is for {fitting} processes, not {processes}: name another number."]
        )
    return make(_SIZES[size], processes, seq_length, data)
