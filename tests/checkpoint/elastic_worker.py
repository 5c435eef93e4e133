"""Saves in every layout, resumes in others: forked gloo worlds of 1, 2 and 4 ranks.

The sources are made first in worlds that grow, then the worlds shrink again; each engine resumes
from several checkpoints in turn.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint import resharding
from ghostvis_mega.checkpoint.rewrite import Target, reshard
from ghostvis_mega.checkpoint.store import CheckpointStore
from ghostvis_mega.config.schema import ParallelConfig
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.certify import problem
from ghostvis_mega.utils.determinism import make_deterministic
from ghostvis_mega.utils.files import atomic_write_json
from ghostvis_mega.utils.forks import run_forked
from tests.checkpoint.consolidate import consolidate, differing

BEFORE, AFTER = 2, 2
"""Steps before the save, and after it."""
FEW = {"data": {"packing": False}, "batch": {"micro_size": 2}}
BF16 = {"train": {"precision": "bf16"}}
TP2: dict[str, Any] = {"parallel": {"tensor": 2}}


ANEW = ", cut anew"
"""Of a source that `ckpt reshard` has written for other ranks before; worlds of one only."""
FOR_SIX = Target(ParallelConfig(tensor=2, pipeline=3, last_stage_layers=2), world_size=6)


@dataclass(frozen=True)
class Case:
    """A layout; `sources` are names of others that it resumes from."""

    name: str
    ranks: int
    stage: int
    sections: dict[str, Any]
    sources: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    saves: bool = True


CASES = [
    Case("one zero0", 1, 0, {}),
    Case("two tp2sp zero1", 2, 1, TP2, ("one zero0",)),
    Case(
        "two pp2 interleaved zero2",
        2,
        2,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        ("two tp2sp zero1",),
    ),
    Case("two zero3, vision zero2", 2, 3, {}, ("one zero0", "two pp2 interleaved zero2")),
    Case("two cp2 zero1", 2, 1, {"parallel": {"context": 2}}, ("two zero3, vision zero2",)),
    Case(
        "four tp2sp pp2 3+1 zero1",
        4,
        1,
        {"parallel": {"tensor": 2, "pipeline": 2, "first_stage_layers": 3}},
        ("one zero0", "two zero3, vision zero2"),
    ),
    Case("four zero2 offloaded", 4, 2, {}, ("two tp2sp zero1",), ("llm", "vision")),
    Case(
        "two tp2sp zero1 again",
        2,
        1,
        TP2,
        ("four zero2 offloaded", "four tp2sp pp2 3+1 zero1", "two cp2 zero1"),
        saves=False,
    ),
    Case(
        "one zero1 again",
        1,
        1,
        {},
        (
            "four tp2sp pp2 3+1 zero1",
            "four zero2 offloaded",
            "two pp2 interleaved zero2",
            "two zero3, vision zero2, cut anew",
        ),
        saves=False,
    ),
    Case("two bf16 tp2sp zero2", 2, 2, TP2 | BF16),
    Case("one bf16 zero1", 1, 1, BF16, ("two bf16 tp2sp zero2",), saves=False),
    Case("two bf16 zero3, vision zero2", 2, 3, BF16, ("two bf16 tp2sp zero2",), saves=False),
]


def steps(engine: TrainEngine, first: int, count: int) -> list[float]:
    """Loss of each step."""
    losses = []
    for step in range(first, first + count):
        rows, pictures = problem.make_rows(engine.run, kind="mixed", step=step)
        batch = problem.step_input(engine.run, engine.groups, rows, pictures, step=step)
        result = engine.step(batch, step=step)
        assert not result.skipped
        losses.append(result.loss)
    return losses


def store_of(folder: Path, name: str) -> CheckpointStore:
    return CheckpointStore(folder / name.replace(" ", "_").replace(",", ""), keep=1)


def run_cases(cases: list[Case], folder: Path, rank: int) -> dict[str, Any]:
    """What one rank of a world does: all layouts of that size."""
    make_deterministic()
    apply_cpu_shim()
    dist.init_process_group("gloo")
    own = folder / f"ds-{len(cases)}-{cases[0].ranks}-{rank}-{cases[0].name.replace(' ', '')}"
    own.mkdir()
    results = {}
    for case in cases:
        run = problem.make_run(
            own, stage=case.stage, offload=case.offload, **problem.merge(FEW, case.sections)
        )
        groups = build_groups(Degrees.of(run, world_size=case.ranks), seed=1)
        engine = TrainEngine(run, groups, device=torch.device("cpu"))
        results[case.name] = visit(case, engine, folder)
        engine.close()
        destroy_groups()
    return results


def visit(case: Case, engine: TrainEngine, folder: Path) -> dict[str, Any]:
    """Save as a source, then resume from the others and save at once."""
    out: dict[str, Any] = {"losses": [], "pairs": {}}
    if case.saves:
        out["losses"] = steps(engine, 0, BEFORE)
        store_of(folder, case.name).save(engine, step=BEFORE, extra={})
        out["losses"] += steps(engine, BEFORE, AFTER)
    for source in case.sources:
        found = store_of(folder, source.removesuffix(ANEW)).find("auto")
        if source.endswith(ANEW):
            found = reshard(found, folder / "anew", FOR_SIX)
        state = store_of(folder, "unused").load(found, engine)
        again = store_of(folder, f"{case.name} from {source}")
        path = again.save(engine, step=state.step, extra={})
        pair = {"step": state.step, "sequences": state.sequences}
        if engine.groups.rank == 0:
            pair["differing"] = differing(consolidate(found), consolidate(path))
        if (case.name, source) == CONTROL:
            pair["control"] = broken(case, engine, folder, found)
            store_of(folder, "unused").load(found, engine)
        pair["losses"] = steps(engine, state.step, AFTER)
        out["pairs"][source] = pair
    return out


CONTROL = ("two tp2sp zero1", "one zero0")


def broken(case: Case, engine: TrainEngine, folder: Path, found: Path) -> list[str]:
    """What the comparison says of a reader that takes gate and up for one matrix."""

    def as_one_matrix(info: Any, wanted: resharding.Part, saved: int) -> Any:
        return original(info.model_copy(update={"partition_parts": 1}), wanted, saved)

    original, resharding._rows = resharding._rows, as_one_matrix
    store_of(folder, "unused").load(found, engine)
    resharding._rows = original
    path = store_of(folder, f"{case.name} broken").save(engine, step=BEFORE, extra={})
    return differing(consolidate(found), consolidate(path)) if engine.groups.rank == 0 else []


def main(folder: Path) -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    at = 0
    while at < len(CASES):
        end = at
        while end < len(CASES) and CASES[end].ranks == CASES[at].ranks:
            end += 1
        action: Callable[[int], Any] = partial(run_cases, CASES[at:end], folder)
        forked = run_forked(action, ranks=CASES[at].ranks, folder=folder, timeout_s=240)
        results |= forked[0]
        at = end
    atomic_write_json(folder / "result.json", results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
