"""One rank of the resume launch, in which every layout saves and resumes."""

import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint import restore as restore_module
from ghostvis_mega.checkpoint.store import CheckpointStore, load_weights
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import Groups, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.certify import problem
from ghostvis_mega.utils.determinism import make_deterministic
from ghostvis_mega.utils.errors import CheckpointError
from tests.checkpoint.state import State, buffers_agree, differing, raw_state, raw_zero
from tests.launch import write_result

WORLD = 4
BEFORE, AFTER = 2, 2
"""Steps before the save, and after it."""


@dataclass(frozen=True)
class Layout:
    """One case; `sections` go into the run's settings."""

    name: str
    stage: int
    """Of ZeRO; the vision engine has 2 where the LLM has 3."""
    sections: dict[str, Any] = field(default_factory=dict)
    offload: tuple[str, ...] = ()
    """Engines whose optimizer is on the host."""

    def run(self, folder: Path) -> RunConfig:
        """Settings; `folder` takes the DeepSpeed files."""
        return problem.make_run(folder, stage=self.stage, offload=self.offload, **self.sections)

    @property
    def folder(self) -> str:
        """Name of the folder of its checkpoints."""
        return self.name.replace(",", "").replace(" ", "_")


TP2_PP2 = {"parallel": {"tensor": 2, "pipeline": 2}}
FEW = {"data": {"packing": False}, "batch": {"micro_size": 2}}
"""Fewer micro-batches, where each costs much: ZeRO-3 gathers, bf16 is slow on CPUs."""
BF16 = problem.merge(FEW, {"train": {"precision": "bf16"}})
TP2_BF16 = problem.merge({"parallel": {"tensor": 2}}, BF16)
PERCEIVER = {"model": {"connector": {"kind": "perceiver_mlp"}}}
UNTIED = {"model": {"llm": {"tied_embeddings": False}}}
LAYOUTS = [
    Layout("dp4 zero1", 1),
    Layout("tp2sp pp2 zero1", 1, sections=TP2_PP2),
    Layout(
        "pp2 interleaved zero2",
        2,
        sections={"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    ),
    Layout("dp4 zero3, vision zero2", 3, FEW),
    Layout("tp2 zero0", 0, sections={"parallel": {"tensor": 2, "sequence_parallel": False}}),
    Layout(
        "pp2 frozen llm",
        1,
        sections=problem.merge(
            {"parallel": {"pipeline": 2}, "train": {"freeze": ["llm"]}}, PERCEIVER
        ),
    ),
    Layout(
        "pp2 frozen tower, untied",
        2,
        sections=problem.merge(
            {"parallel": {"pipeline": 2}, "train": {"freeze": ["vision"]}}, UNTIED
        ),
    ),
    Layout(
        "tp2sp cp2 zero1",
        1,
        sections=problem.merge({"parallel": {"tensor": 2, "context": 2}}, FEW),
    ),
    Layout("tp2sp bf16 zero2", 2, TP2_BF16),
    Layout("dp4 bf16 zero3, vision zero2", 3, BF16),
    Layout("tp2sp pp2 zero1 offloaded", 1, TP2_PP2, offload=("llm", "vision")),
    Layout("tp2sp bf16 zero2 offloaded", 2, TP2_BF16, offload=("llm", "vision")),
    Layout("dp4 bf16 zero3 offloaded, vision zero2", 3, BF16, offload=("llm",)),
]


BY_NAME = {layout.name: layout for layout in LAYOUTS}
UNEVEN = Layout(
    "tp2sp pp2 3 + 1 layers, zero1 offloaded",
    1,
    problem.merge(TP2_PP2, {"parallel": {"first_stage_layers": 3}}),
    offload=("llm", "vision"),
)
ZERO3_OFFLOADED = Layout("dp4 zero3 offloaded, vision zero2", 3, FEW, offload=("llm", "vision"))


class Ranks:
    """What the scenarios of one rank share."""

    def __init__(self, folder: Path, own: Path, rank: int):
        self.folder, self.own, self.rank = folder, own, rank
        self.results: dict[str, Any] = {}

    def degrees(self, run: RunConfig) -> Degrees:
        return Degrees.of(run, world_size=WORLD)

    def engine(self, run: RunConfig, groups: Groups) -> TrainEngine:
        return TrainEngine(run, groups, device=torch.device("cpu"))

    def steps(self, engine: TrainEngine, first: int, count: int) -> list[tuple[float, float]]:
        """Loss and norm of each step."""
        out = []
        for step in range(first, first + count):
            rows, pictures = problem.make_rows(engine.run, kind="mixed", step=step)
            batch = problem.step_input(engine.run, engine.groups, rows, pictures, step=step)
            result = engine.step(batch, step=step)
            assert not result.skipped
            out.append((result.loss, result.grad_norm))
        return out

    def refusal(self, action: Callable[[], object]) -> list[str]:
        """What each rank is told when it may not do something."""
        try:
            action()
        except CheckpointError as error:
            return self.everywhere(str(error))
        return self.everywhere("accepted")

    def everywhere(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * WORLD
        dist.all_gather_object(gathered, value)
        return gathered


def spoil(engine: TrainEngine) -> None:
    """Change every weight: a frozen one would be right by its seed alone."""
    encoder = engine.parts.encoder
    for module in (*engine.parts.chunks, encoder):
        for parameter in module.parameters():
            parameter.data.add_(1.0)


def draws() -> list[float]:
    """One number from each generator."""
    return [random.random(), float(np.random.normal()), float(torch.rand(()))]


def resume(ranks: Ranks, layout: Layout) -> None:
    """2 steps, save, 2 steps; against a new engine: load, 2 steps."""
    began = time.perf_counter()
    run = layout.run(ranks.own)
    groups = build_groups(ranks.degrees(run), seed=1)
    store = CheckpointStore(ranks.folder / layout.folder, keep=1)
    engine = ranks.engine(run, groups)
    losses = ranks.steps(engine, 0, BEFORE)
    random.seed(ranks.rank)
    np.random.seed(ranks.rank)
    np.random.normal()
    path = store.save(engine, step=BEFORE, extra={"note": layout.name})
    saved, drawn = raw_state(engine), draws()
    losses += ranks.steps(engine, BEFORE, AFTER)
    final = raw_state(engine)
    del engine

    engine = ranks.engine(run, groups)
    spoil(engine)
    found = store.find("auto")
    state = store.load(found, engine)
    loaded = differing(saved, raw_state(engine))
    agree = buffers_agree(engine)
    drawn_again = draws()
    again = ranks.steps(engine, BEFORE, AFTER)
    results = ranks.everywhere(
        {
            "path": found == path,
            "state": [state.step, state.sequences, state.extra],
            "draws": drawn == drawn_again,
            "after_load": loaded,
            "buffers_agree": agree,
            "losses": [losses[BEFORE:], again],
            "at_end": differing(final, raw_state(engine)),
        }
    )
    if layout.name in CONTROLS:
        forgotten = CONTROLS[layout.name]
        results[0]["controls"] = controls(ranks, store, engine, final, forgotten=forgotten)
    results[0]["seconds"] = round(time.perf_counter() - began, 1)
    ranks.results[layout.name] = results
    destroy_groups()


CONTROLS = {"dp4 zero1": ("exp_avg", "exp_avg_sq"), "tp2sp bf16 zero2 offloaded": ("master",)}
"""What a broken resume forgets, by layout."""


def controls(
    ranks: Ranks,
    store: CheckpointStore,
    engine: TrainEngine,
    final: State,
    *,
    forgotten: tuple[str, ...],
) -> dict[str, bool]:
    """Whether a resume that forgets something is noticed; one that forgets nothing must not be."""
    noticed: dict[str, bool] = {}
    path = store.find("auto")

    def differs() -> bool:
        store.load(path, engine)
        ranks.steps(engine, BEFORE, AFTER)
        return any(ranks.everywhere(bool(differing(final, raw_state(engine)))))

    saved_kinds, set_steps = restore_module.saved_kinds, restore_module.set_optimizer_steps
    for kind in forgotten:
        restore_module.saved_kinds = lambda held, kind=kind: tuple(
            k for k in saved_kinds(held) if k != kind
        )
        noticed[kind] = differs()
    restore_module.saved_kinds = saved_kinds
    restore_module.set_optimizer_steps = lambda zero, steps: None
    noticed["optimizer steps"] = differs()
    restore_module.set_optimizer_steps = set_steps
    noticed["nothing"] = differs()
    return noticed


def damage(ranks: Ranks) -> None:
    """One flipped byte in one rank's file: all ranks refuse with its name, no weight changes."""
    run = LAYOUTS[0].run(ranks.own)
    groups = build_groups(ranks.degrees(run), seed=1)
    engine = ranks.engine(run, groups)
    before = weights_of(engine)
    source = CheckpointStore(ranks.folder / "dp4_zero1", keep=1).find("auto")
    copy = ranks.folder / "damaged"
    file = copy / "optimizer-00002.safetensors"
    if ranks.rank == 0:
        shutil.copytree(source, copy)
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    dist.barrier()
    store = CheckpointStore(ranks.folder / "unused", keep=1)
    flipped = ranks.refusal(lambda: store.load(copy, engine))
    other = ranks.folder / BY_NAME["pp2 frozen llm"].folder / source.name
    layout = ranks.refusal(lambda: store.load(other, engine))
    blocked = ranks.folder / "blocked"
    if ranks.rank == 0:
        blocked.write_text("a file where a folder should be")
    dist.barrier()
    write = ranks.refusal(lambda: CheckpointStore(blocked, keep=1).save(engine, step=1, extra={}))
    ranks.results["damage"] = {
        "file": str(file),
        "flipped": flipped,
        "layout": layout,
        "write": write,
        "unchanged": ranks.everywhere(differing(before, weights_of(engine))),
        "fallback": fallback(ranks, engine),
    }
    destroy_groups()


def fallback(ranks: Ranks, engine: TrainEngine) -> list[list[int]]:
    """Three saves in the background, the last damaged: the step from which each rank goes on, and
    that of the checkpoint that a save after it leaves."""
    store = CheckpointStore(ranks.folder / "fallback", keep=2)
    for step in (1, 2, 3):
        store.begin(engine, step=step, extra={})
    store.wait()
    file = store.folder.directory(3) / "vision-00000.safetensors"
    if ranks.rank == 0:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    dist.barrier()
    step = store.resume("auto", engine).step
    store.begin(engine, step=4, extra={})
    store.close()
    left = [int(path.name[-1]) for path in store.folder.candidates()]
    return ranks.everywhere([step, *left])


def weights_alone(ranks: Ranks) -> None:
    """dp4 -> tp2 x pp2 of 3 + 1 layers -> pp2 interleaved and dp4: the same weights, the same loss,
    fresh moments."""
    there = LAYOUTS[0].run(ranks.own)
    cut = UNEVEN.run(ranks.own)
    source = CheckpointStore(ranks.folder / "dp4_zero1", keep=1).find("auto")
    groups = build_groups(ranks.degrees(cut), seed=1)
    engine = ranks.engine(cut, groups)
    taken = load_weights(source, engine)
    agree_on_host = buffers_agree(engine)
    path = CheckpointStore(ranks.folder / "cut", keep=1).save(engine, step=0, extra={})
    losses = [ranks.steps(engine, BEFORE, 1)[0][0]]
    destroy_groups()
    interleaved = BY_NAME["pp2 interleaved zero2"].run(ranks.own)
    groups = build_groups(ranks.degrees(interleaved), seed=1)
    engine = ranks.engine(interleaved, groups)
    spoil(engine)
    load_weights(path, engine)
    losses.append(ranks.steps(engine, BEFORE, 1)[0][0])
    destroy_groups()
    groups = build_groups(ranks.degrees(there), seed=1)
    engine = ranks.engine(there, groups)
    fresh = {name: p.clone() for name, p in engine.parts.encoder.named_parameters()}
    only = load_weights(path, engine, modules=("llm",))
    partial = [
        n for n, p in engine.parts.encoder.named_parameters() if not torch.equal(p, fresh[n])
    ]
    load_weights(path, engine)
    mine = weights_of(engine)
    moments = [t for name, t in raw_zero(engine.parts.llm_engine).items() if "exp_avg" in name]
    agree = buffers_agree(engine)
    CheckpointStore(ranks.folder / "unused", keep=1).load(source, engine)
    ranks.results["weights alone"] = {
        "taken": [taken, only],
        "partial": partial,
        "moments": any(bool(t.any()) for t in moments),
        "buffers_agree": all(ranks.everywhere(agree and agree_on_host)),
        "differing": ranks.everywhere(differing(mine, weights_of(engine))),
        "losses": [*losses, ranks.steps(engine, BEFORE, 1)[0][0]],
    }
    destroy_groups()


def host_and_back(ranks: Ranks) -> None:
    """Optimizer states go from the host to runs without offload and back; weights alone become
    masters there."""
    results: dict[str, Any] = {}
    for offloaded, other, saved in (
        (BY_NAME["tp2sp pp2 zero1 offloaded"], BY_NAME["tp2sp pp2 zero1"], 0),
        (ZERO3_OFFLOADED, BY_NAME["dp4 zero3, vision zero2"], 1),
    ):
        folder = ranks.folder / (offloaded, other)[saved].folder
        source = CheckpointStore(folder, keep=1).find("auto")
        states, agree = [], []
        for layout in (offloaded, other):
            groups = build_groups(ranks.degrees(layout.run(ranks.own)), seed=1)
            engine = ranks.engine(layout.run(ranks.own), groups)
            load_weights(source, engine)
            agree.append(buffers_agree(engine))
            CheckpointStore(ranks.folder / "unused", keep=1).load(source, engine)
            states.append(raw_state(engine))
            destroy_groups()
        results[offloaded.name] = ranks.everywhere([differing(*states), *agree])
    ranks.results["host and back"] = results


def weights_of(engine: TrainEngine) -> State:
    state = raw_state(engine)
    return {name: tensor for name, tensor in state.items() if not name.startswith("zero")}


def main() -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    make_deterministic()
    apply_cpu_shim()
    dist.init_process_group("gloo")
    folder, rank = Path(os.environ["LAUNCH_FOLDER"]), dist.get_rank()
    own = folder / f"rank{rank}"
    own.mkdir()
    ranks = Ranks(folder, own, rank)
    for layout in LAYOUTS:
        resume(ranks, layout)
        if rank == 0:
            print(layout.name, ranks.results[layout.name][0], flush=True)
    damage(ranks)
    weights_alone(ranks)
    host_and_back(ranks)
    if rank == 0:
        write_result(ranks.results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
