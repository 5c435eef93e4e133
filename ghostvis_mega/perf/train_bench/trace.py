"""One step under PyTorch's profiler: a trace for a viewer, and where the time went by kind."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ghostvis_mega.perf.train_bench.trainer import Trainer, synchronize, trace_file

TOP = 8
"""Kernels that are named one by one."""
_SHOWN_CHARACTERS = 60

GROUPS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all"),
    ("loss", r"cross_?entropy|nll_loss|log_?softmax|linear_ce|fused_linear"),
    ("attention", r"attention|flash|fmha|sdpa|mha_|_softmax|softmax_warp|scaled_.*softmax"),
    ("optimizer", r"adam|multi_tensor|foreach|l2norm|lamb"),
    ("GEMM", r"gemm|cublas|cutlass|xmma|nvjet|sm\d+_.*(mm|tn|nt|nn)|wgmma|addmm|\bmm\b|\bbmm\b"
             r"|aten::(mm|bmm|addmm|linear|conv)|convolution|wgrad"),
    ("norm and activation", r"norm|silu|swiglu|swish|gelu|glu|rope|rotary|sigmoid|activation"),
    ("copy and cast", r"copy|cast|memcpy|memset|cat|transpose|_to_copy|fill|quantize|amax|zero_"),
)  # fmt: skip
"""Kinds by what a kernel's name holds; the first that fits counts. What is left is `other`."""
OTHER = "other"


@dataclass(frozen=True)
class Span:
    """One kernel, or on a CPU one operator less what it calls."""

    name: str
    start_us: float
    end_us: float
    own_us: float


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    for kind, pattern in GROUPS:
        if re.search(pattern, name, flags=re.IGNORECASE):
            return kind
    return OTHER


def busy_us(spans: Iterable[Span]) -> float:
    """Time in which at least one of them ran; kernels of several streams overlap."""
    busy, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start_us):
        if span.end_us > until:
            busy += span.end_us - max(span.start_us, until)
            until = span.end_us
    return busy


def trace_figures(spans: Sequence[Span], *, step_us: float, on_gpu: bool) -> list[dict[str, Any]]:
    """Name, value and unit: share of the step by kind, idle share of the GPU, and the kernels that
    took most.

    Kinds may add up to more than the step where kernels of several streams overlap.
    """
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for span in spans:
        kinds[kind_of(span.name)] += span.own_us
        names[span.name] += span.own_us
    unit = "% of the step"
    figures = [{"name": "step", "value": step_us / 1e6, "unit": "s"}]
    for kind in (*(kind for kind, _ in GROUPS), OTHER):
        figures.append({"name": kind, "value": 100 * kinds[kind] / step_us, "unit": unit})
    if on_gpu:
        idle = max(0.0, step_us - busy_us(spans))
        figures.append({"name": "GPU idle", "value": 100 * idle / step_us, "unit": unit})
    for name, own_us in names.most_common(TOP):
        short = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."
        figures.append({"name": f"kernel {short}", "value": 100 * own_us / step_us, "unit": unit})
    return figures


def traced_step(
    trainer: Trainer, *, step: int, folder: Path, name: str, device: torch.device
) -> list[dict[str, Any]]:
    """Train one step under the profiler; collective. Each rank writes a Chrome trace; returns the
    figures of the first, none on others.

    The profiler makes a step longer, above all on the CPU: its shares count, not its time.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    folder.mkdir(parents=True, exist_ok=True)
    synchronize(device)
    dist.barrier()
    with profile(activities=activities) as profiler, torch.profiler.record_function(_STEP):
        trainer.step(step)
        synchronize(device)
    profiler.export_chrome_trace(str(trace_file(folder, name, dist.get_rank())))
    if dist.get_rank() != 0:
        return []
    events = list(profiler.events())
    (whole,) = (e for e in events if e.name == _STEP and e.device_type == DeviceType.CPU)
    step_us = whole.time_range.elapsed_us()
    return trace_figures(list(_spans(events, on_gpu=on_gpu)), step_us=step_us, on_gpu=on_gpu)


_STEP = "ghostvis: traced step"


def _spans(events: Iterable[Any], *, on_gpu: bool) -> Iterable[Span]:
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        # Ranges that a library has named are no work of their own.
        if event.name == _STEP or getattr(event, "is_user_annotation", False):
            continue
        if on_gpu and event.device_type == DeviceType.CUDA:
            yield Span(event.name, start, end, end - start)
        elif not on_gpu and event.device_type == DeviceType.CPU:
            yield Span(event.name, start, end, event.self_cpu_time_total)
