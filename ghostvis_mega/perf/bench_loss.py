"""Time and memory of output layer and loss, with and without all scores at once."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.engine.build import build_chunks
from ghostvis_mega.model.inputs import ModelInput, model_input
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.loss_chunks import CHUNK_BYTES
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.figures import Figure, at_most, measured

MIB = 1024**2
_WARM_UP = 2
_BARS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference between the two ways. In BF16 both round each score's gradient, and
the unfused way the matrix's as well: each is some 4e-3 from the truth."""


@dataclass(frozen=True)
class LayerSize:
    """An output layer."""

    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.hidden} x {self.vocabulary:,}"


@dataclass
class _Bench:
    """One output layer with its input; only its `loss_sum` runs."""

    chunk: LLMChunk
    inputs: ModelInput
    hidden_SBH: torch.Tensor
    device: torch.device

    @property
    def weight(self) -> torch.Tensor:
        return self.chunk.output.weight

    def train(self) -> torch.Tensor:
        """Forward and backward; the matrix's gradient is added to what is there, as those of
        micro-batches are."""
        self.hidden_SBH.grad = None
        loss = self.chunk.loss_sum(self.hidden_SBH, self.inputs) / len(self.inputs.labels_R)
        loss.backward()
        return loss.detach()

    def score(self) -> torch.Tensor:
        """The loss alone."""
        with torch.no_grad():
            return self.chunk.loss_sum(self.hidden_SBH, self.inputs)


def bench_run(
    size: LayerSize, *, tensor: int, precision: str, device: str, ranks_per_gpu: int = 1
) -> RunConfig:
    """Settings of a model that is little more than its output layer."""
    llm = {
        "num_layers": 1,
        "hidden_size": size.hidden,
        "num_heads": tensor,
        "num_kv_heads": tensor,
        "head_dim": 16,
        "ffn_hidden_size": 16 * tensor,
        "vocab_size": size.vocabulary,
        "max_positions": 64,
        "tied_embeddings": True,
    }
    return RunConfig.model_validate(
        {
            "model": {"llm": llm},
            "data": {"train": "unused", "seq_length": 64},
            "batch": {"global_size": 1, "micro_size": 1},
            "parallel": {"tensor": tensor, "sequence_parallel": False},
            "deepspeed": {"llm": "unused"},
            "train": {
                "steps": 1,
                "seed": 5,
                "precision": precision,
                "device": device,
                "ranks_per_gpu": ranks_per_gpu,
            },
            # Where a hang would be reported.
            "log": {"output": Path(tempfile.gettempdir()) / "ghostvis-bench-loss"},
        }
    )


def measure_loss(
    runs: Sequence[RunConfig],
    groups: Groups,
    *,
    device: torch.device,
    rows: int,
    repeats: int,
    progress: Callable[[str], None],
    chunks_mib: Sequence[int] = (),
) -> list[Figure]:
    """Rows of name, value, unit, bar and ok for each output layer; collective.

    Time is the median and memory the peak beyond what is there before and after (hidden states,
    matrix, its fp32 gradient), both of the slowest or fullest rank. Memory is PyTorch's allocated
    bytes on a GPU and resident bytes of the process on a CPU. A way that does not fit on one GPU is
    a row like others.

    Args:
        runs: Of `bench_run`, with this world's tensor degree.
        groups: Of this rank; all ranks share one output layer.
        device: Of this rank.
        rows: Trained positions of a micro-batch.
        repeats: Timings of each kind.
        progress: Told what is being done.
        chunks_mib: Most that the scores of one chunk may take, a fused way each; none: as training
            has it.
    """
    fused = {f"fused, {size} MiB": size * MIB for size in chunks_mib} or {"fused": CHUNK_BYTES}
    figures = []
    for run in runs:
        llm = run.model.llm
        name = str(LayerSize(llm.hidden_size, llm.vocab_size))
        bench = _make(run, groups, device=device, rows=rows)
        found: dict[str, tuple[torch.Tensor, ...]] = {}
        for way in ("unfused", *fused):
            progress(f"{way} loss of {name}")
            bench.chunk.fused_loss = way in fused
            bench.chunk.loss_chunk_bytes = fused.get(way, CHUNK_BYTES)
            try:
                figures += _measure(bench, f"{name}, {way}", repeats=repeats, progress=progress)
                found[way] = _outcome(bench)
            except torch.cuda.OutOfMemoryError:
                if dist.get_world_size() > 1:
                    raise  # the other ranks wait in a collective
                total = torch.cuda.get_device_properties(device).total_memory / MIB
                figures.append(measured(f"{name}, {way}: does not fit into", total, "MiB"))
        truth = found.pop("unfused", None)
        for way, outcome in found.items() if truth is not None else ():
            label = name if len(fused) == 1 else f"{name}, {way}"
            bar = _BARS[run.train.precision]
            figures += _differences(label, outcome, truth, bar=bar, device=device)
        del bench, found, truth
    return figures


def _make(run: RunConfig, groups: Groups, *, device: torch.device, rows: int) -> _Bench:
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    # The layers never run, so that it does not matter whose they are.
    (chunk,) = build_chunks(run, groups, device=device, dtype=dtype, backend="cpu")
    generator = torch.Generator().manual_seed(run.train.seed)
    tokens_BS = torch.randint(0, run.model.llm.vocab_size, (1, rows), generator=generator)
    batch = MicroBatch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        weights_BS=torch.ones(1, rows),
        positions_BS=torch.arange(rows)[None],
        cu_seqlens=None,
        max_seqlen=rows,
        images=(),
        sample_ids=(0,),
    )
    hidden_SBH = torch.randn(rows, 1, run.model.llm.hidden_size, generator=generator)
    bench = _Bench(
        chunk=chunk,
        inputs=model_input(batch, tokens_per_image=0, device=device, for_sdpa=False),
        hidden_SBH=hidden_SBH.to(device, dtype).requires_grad_(),
        device=device,
    )
    if dtype != torch.float32:
        # As in training: micro-batches add up in fp32.
        bench.weight.grad_dtype = torch.float32
    bench.weight.grad = torch.zeros_like(bench.weight, dtype=torch.float32)
    return bench


def _measure(
    bench: _Bench, name: str, *, repeats: int, progress: Callable[[str], None]
) -> list[Figure]:
    for _ in range(_WARM_UP):
        progress("warm-up")
        bench.train()
        bench.score()
    bench.hidden_SBH.grad = None
    before = _start_of_peak(bench.device)
    bench.train()
    peak = _peak(bench.device) - before
    seconds = [
        median(_seconds(call, bench.device, progress) for _ in range(repeats))
        for call in (bench.train, bench.score)
    ]
    both, alone, peak = _most([*seconds, peak], bench.device)
    flops = 6 * len(bench.inputs.labels_R) * bench.weight.numel()
    return [
        measured(f"{name}: forward and backward", 1000 * both, "ms"),
        measured(f"{name}: products of both, a process", flops / both / 1e12, "TFLOP/s"),
        measured(f"{name}: loss alone", 1000 * alone, "ms"),
        measured(f"{name}: peak beyond weights and gradients", peak / MIB, "MiB"),
    ]


def _seconds(
    call: Callable[[], torch.Tensor], device: torch.device, progress: Callable[[str], None]
) -> float:
    progress("timing")
    dist.barrier()
    _finish(device)
    began = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_of_peak(device: torch.device) -> int:
    """Bytes held; the peak counts from here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def _most(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value on any rank."""
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals, op=dist.ReduceOp.MAX)
    return totals.tolist()


def _outcome(bench: _Bench) -> tuple[torch.Tensor, ...]:
    """Loss and gradients of hidden states and matrix, of one pass."""
    bench.weight.grad.zero_()
    loss = bench.train()
    return loss, bench.hidden_SBH.grad, bench.weight.grad.clone()


def _differences(
    name: str,
    outcome: tuple[torch.Tensor, ...],
    truth: tuple[torch.Tensor, ...],
    *,
    bar: float,
    device: torch.device,
) -> list[Figure]:
    parts = ("loss", "gradient of the hidden states", "gradient of the matrix")
    distances = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(outcome, truth, strict=True)
    ]
    return [
        at_most(f"{name}: {part}, relative difference", distance, "", bar)
        for part, distance in zip(parts, _most(distances, device), strict=True)
    ]
