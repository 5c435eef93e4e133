"""`ghostvis leak`: whether packed samples feel each other."""

import os

from ghostvis_mega.cli.output import AsJson, conclude
from ghostvis_mega.utils.logging import setup_logging

LEAK_HELP = """Change one packed sample; print what moves in the others. It must be exactly nothing.

\b
Examples (CPU: fp32; one GPU: BF16 and every FP8 recipe; about a minute):
  python -m ghostvis_mega leak
  python -m ghostvis_mega leak --json

\b
FP8 `tensorwise` and `blockwise` scale a tensor, or 128 tokens of it, by what is in there now, so
samples share a scale by design: their rows are shown without a bar. With samples padded to whole
blocks (data.segment_align=128) `blockwise` is held to zero as well.
Exit code: 0 nothing leaks and the control does, 1 otherwise.
"""

COUPLED = ("tensorwise", "blockwise")
"""FP8 recipes whose scaling factors are shared by samples of the current pack."""


def leak(
    as_json: AsJson = False,
) -> None:
    """Measure the packing leak on this machine's device."""
    # Before Transformer Engine is imported: its attention may otherwise add in any order.
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    setup_logging(rank=0)
    import torch

    from ghostvis_mega.perf.leak import ALIGNED, leak_run, measure_leak
    from ghostvis_mega.session import open_world

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    kinds = ["none", "delayed", *COUPLED] if on_gpu else ["none"]
    runs = [leak_run(precision="bf16" if on_gpu else "fp32", fp8=fp8) for fp8 in kinds]
    rows = []
    with open_world(runs[0], device=device) as world:
        for run in runs:
            tell = world.watchdog.alive
            bar = None if run.train.fp8 in COUPLED else 0.0
            rows += measure_leak(run, world.groups, device=device, bar=bar, progress=tell)
            if run.train.fp8 == "blockwise":
                rows += measure_leak(
                    run, world.groups, device=device, bar=0.0, lengths=ALIGNED, progress=tell
                )
    conclude(rows, title="packing leak", as_json=as_json)
