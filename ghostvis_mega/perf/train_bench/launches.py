"""Each row of the training benchmark in a launch of its own, killed whole when its time is up."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.train_bench.results import RowResult, failed
from ghostvis_mega.perf.train_bench.rows import Row
from ghostvis_mega.utils.launch import RankError, RankHang, device_environment, run_ranks

ORDER_VARIABLE = "GHOSTVIS_BENCH_TRAIN"
"""Names the file that tells a rank what to do."""
_ERROR_OUTPUT = 2
_DEFAULTS = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""Of every row, where this process's environment and the row's say nothing: what torchrun sets, and
what Megatron-Core needs to overlap tensor-parallel communication."""


@dataclass(frozen=True)
class Order:
    """What the ranks of one row are told."""

    row: Row
    run: RunConfig
    warm_up: int
    steps: int
    folder: Path
    """Takes the result and what failed ranks say."""
    trace: Path | None = None
    """Folder for the trace of one more step."""

    @property
    def result(self) -> Path:
        """Where the first rank writes what came out."""
        return self.folder / "result.json"

    def reason(self, rank: int) -> Path:
        """Where a rank writes why it failed."""
        return self.folder / f"reason{rank}.txt"

    def write(self, path: Path) -> None:
        """Store it as JSON."""
        values = {
            "row": [self.row.name, self.row.kind, list(self.row.settings)],
            "run": self.run.model_dump(mode="json"),
            "warm_up": self.warm_up,
            "steps": self.steps,
            "folder": str(self.folder),
            "trace": None if self.trace is None else str(self.trace),
        }
        path.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Order":
        """What `write` stored."""
        values = json.loads(path.read_text(encoding="utf-8"))
        name, kind, settings = values["row"]
        return cls(
            row=Row(name, kind, tuple(settings)),
            run=RunConfig.model_validate(values["run"]),
            warm_up=values["warm_up"],
            steps=values["steps"],
            folder=Path(values["folder"]),
            trace=None if values["trace"] is None else Path(values["trace"]),
        )


def run_row(
    order: Order, *, target: Sequence[str], processes: int, timeout_s: float, device: str
) -> RowResult:
    """Run one row to its end; what stops it becomes its result.

    Args:
        order: What to do.
        target: `["-m", MODULE]` or `[SCRIPT]` of a rank, which finds the order's file in the
            environment.
        processes: Ranks to start.
        timeout_s: From the start to the end of the slowest rank.
        device: `cpu` hides GPUs from the ranks.
    """
    order.folder.mkdir(parents=True)
    file = order.folder / "order.json"
    order.write(file)
    environment = {
        **{name: os.environ.get(name, value) for name, value in _DEFAULTS.items()},
        **dict(order.row.environment),
        ORDER_VARIABLE: str(file),
        **device_environment(device),
    }
    try:
        run_ranks(
            target,
            ranks=processes,
            timeout_s=timeout_s,
            folder=order.folder / "ranks",
            environment=environment,
            first_output=_ERROR_OUTPUT,
        )
    except RankHang as hang:
        return failed(order.row, str(hang).splitlines()[0].rstrip(":"))
    except RankError as failure:
        return failed(order.row, first_reason(order, processes) or str(failure).splitlines()[0])
    result = RowResult.read(order.result)
    told = {name: environment[name] for name in (*_DEFAULTS, *dict(order.row.environment))}
    words = ", ".join(f"{name}={value}" for name, value in told.items())
    return dataclasses.replace(result, description=result.description | {"environment": words})


def first_reason(order: Order, processes: int) -> str:
    """What the rank said that failed first; others lose their connection to it later."""
    told = [order.reason(rank) for rank in range(processes) if order.reason(rank).exists()]
    if not told:
        return ""
    return min(told, key=lambda path: path.stat().st_mtime_ns).read_text(encoding="utf-8")
