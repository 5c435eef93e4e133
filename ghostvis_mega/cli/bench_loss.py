"""`ghostvis bench loss`: output layer and loss, fused and unfused."""

import os
import re
import sys
from typing import Annotated

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS, AsJson, conclude, refusing_settings
from ghostvis_mega.utils.hardware import cpu_name, has_cuda_device
from ghostvis_mega.utils.launch import launch_self
from ghostvis_mega.utils.logging import setup_logging

BENCH_LOSS_HELP = """Time and memory of output layer and loss, with train.fused_loss and without.

\b
Examples (GPUs: the output layers of Qwen2.5 1.5B and 7B, about a minute; a CPU: a narrow one):
  python -m ghostvis_mega bench loss
  python -m ghostvis_mega bench loss --processes 4 --rows 16384 --size 3584x152064 --json
  python -m ghostvis_mega bench loss --processes 4 --ranks-per-gpu 4
  python -m ghostvis_mega bench loss --chunk-mib 512 --chunk-mib 1024 --chunk-mib 1280
  python -m ghostvis_mega bench loss --device cpu --rows 2048 --size 64x152064 --processes 2

\b
The processes share the vocabulary (tensor parallelism). Loss and gradients of both ways are also
compared: relative differences up to 1e-5 in fp32, 2e-2 in BF16. Where GPUs are fewer than ranks,
--ranks-per-gpu tells the memory and the differences of a cut vocabulary, not its time.
Exit code: 0 measured, 1 the two ways differ or a process failed, 2 wrong settings.
"""

GPU_SIZES, GPU_ROWS = ("1536x151936", "3584x152064"), 8192
CPU_SIZES, CPU_ROWS = ("64x152064",), 2048


def bench_loss(
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="HIDDENxVOCABULARY", help="Output layer; repeatable."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Trained positions.  [default: 8192; CPU: 2048]"),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each kind.")] = 10,
    ranks_per_gpu: Annotated[
        int, typer.Option(min=1, help="Ranks that share a GPU, where GPUs are few; slow.")
    ] = 1,
    chunk_mib: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Scores held at a time; repeatable.  [default: 1280]"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16.  [default: bf16; CPU: fp32]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    timeout_s: Annotated[float, typer.Option(min=1, help="For everything.")] = 1800.0,
    as_json: AsJson = False,
) -> None:
    """Start the ranks, or be one of them."""
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is not auto, cpu or cuda", param_hint="--device")
    if precision not in (None, "fp32", "bf16"):
        raise typer.BadParameter(f"{precision!r} is not fp32 or bf16", param_hint="--precision")
    joined = "WORLD_SIZE" in os.environ
    tensor = int(os.environ["WORLD_SIZE"]) if joined else processes
    on_gpu = device != "cpu" and has_cuda_device()
    chosen = size or (GPU_SIZES if on_gpu else CPU_SIZES)
    sizes = [parse_size(text, processes=tensor) for text in chosen]
    if device == "cuda" and not on_gpu:
        typer.echo("--device cuda, but there is no GPU here. Use --device cpu.", err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS)
    if ranks_per_gpu > 1 and not on_gpu:
        typer.echo(f"--ranks-per-gpu {ranks_per_gpu}: no GPU to share. Leave it out.", err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS)
    if processes > 1 and not joined:
        where = "cuda" if on_gpu else "cpu"
        code = launch_self(sys.argv[1:], processes=processes, device=where, timeout_s=timeout_s)
        raise typer.Exit(code)
    _be_a_rank(
        sizes,
        tensor=tensor,
        rows=rows or (GPU_ROWS if on_gpu else CPU_ROWS),
        repeats=repeats,
        chunks_mib=tuple(dict.fromkeys(chunk_mib or ())),
        precision=precision or ("bf16" if on_gpu else "fp32"),
        device="cuda" if on_gpu else "cpu",
        ranks_per_gpu=ranks_per_gpu,
        as_json=as_json,
    )


def parse_size(text: str, *, processes: int) -> tuple[int, int]:
    """(hidden, vocabulary) of "HIDDENxVOCABULARY"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is not HIDDENxVOCABULARY, such as 3584x152064", param_hint="--size"
        )
    hidden, vocabulary = int(match[1]), int(match[2])
    if vocabulary % processes:
        raise typer.BadParameter(
            f"a vocabulary of {vocabulary} does not divide over {processes} processes: use a "
            "multiple, as model.llm.vocab_padding makes one",
            param_hint="--size",
        )
    return hidden, vocabulary


def _be_a_rank(
    sizes: list[tuple[int, int]],
    *,
    tensor: int,
    rows: int,
    repeats: int,
    chunks_mib: tuple[int, ...],
    precision: str,
    device: str,
    ranks_per_gpu: int,
    as_json: bool,
) -> None:
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank=rank)
    import torch

    from ghostvis_mega.perf.bench_loss import LayerSize, bench_run, measure_loss
    from ghostvis_mega.session import local_device, open_world

    runs = [
        bench_run(
            LayerSize(*size),
            tensor=tensor,
            precision=precision,
            device=device,
            ranks_per_gpu=ranks_per_gpu,
        )
        for size in sizes
    ]
    with refusing_settings():
        place = local_device(runs[0])
    with open_world(runs[0], device=place) as world:
        figures = measure_loss(
            runs,
            world.groups,
            device=world.device,
            rows=rows,
            repeats=repeats,
            progress=world.watchdog.alive,
            chunks_mib=chunks_mib,
        )
    name = torch.cuda.get_device_name(place) if device == "cuda" else cpu_name()
    where = name if ranks_per_gpu == 1 else f"{name}, shared by {ranks_per_gpu} ranks each"
    title = f"output layer and loss, {rows} rows, {precision}, {tensor} x {where}"
    conclude(figures, title=title, as_json=as_json, show=rank == 0)
