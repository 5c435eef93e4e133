"""Two data-parallel ranks train with losses that are spoiled on purpose; the guards must act."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.step import StepInput, StepResult, TrainEngine
from ghostvis_mega.perf.stress_data import write_datasets
from ghostvis_mega.perf.stress_layouts import LAYOUTS, StressJob, settings_of, write_deepspeed_files
from ghostvis_mega.session import Training, World, open_world
from ghostvis_mega.train.guards import Guards
from ghostvis_mega.utils.errors import TrainingError
from tests.checkpoint.state import State, differing, raw_state
from tests.launch import write_result

STEPS = 30
NAN = float("nan")


class Spoiler:
    """Multiplies the loss, or sets a gradient, of one rank or all; remembers what each step did."""

    def __init__(self, plan: Mapping[int, tuple[str, int | None, float]]):
        self.plan = plan
        """By step: what (`loss` or `gradient`), the rank or None for all, the factor."""
        self.losses: list[float] = []
        self.skipped: list[int] = []
        self.changed_by_skipped: list[str] = []
        self.before: dict[int, State] = {}
        self.states: dict[int, State] = {}
        self.samples: dict[int, list[list[int]]] = {}

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        honest = TrainEngine.step

        def step(engine: TrainEngine, work: StepInput, *, step: int, **keywords: Any) -> StepResult:
            before = raw_state(engine)
            with self._spoiled(engine, step):
                result = honest(engine, work, step=step, **keywords)
            after = raw_state(engine)
            self.losses.append(result.loss)
            own = sorted({s for micro in work.micro_batches for s in micro.sample_ids})
            self.samples[step] = everywhere(own)
            if result.skipped:
                self.skipped.append(step)
                self.changed_by_skipped += differing(before, after)
            self.before[step], self.states[step] = before, after
            return result

        with mock.patch.object(TrainEngine, "step", step):
            yield

    @contextlib.contextmanager
    def _spoiled(self, engine: TrainEngine, step: int) -> Iterator[None]:
        what, rank, factor = self.plan.get(step, ("", None, 1.0))
        if not what or rank not in (None, engine.groups.rank):
            yield
        elif what == "loss":
            chunk = engine.parts.chunks[-1]
            honest = chunk.loss_sum

            def spoiled(hidden: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
                if math.isnan(factor):
                    return honest(hidden * factor, *args, **keywords)
                loss = honest(hidden, *args, **keywords)
                # The loss alone: the fused loss refuses a gradient that it was not told of.
                return loss + (factor - 1) * loss.detach()

            with mock.patch.object(chunk, "loss_sum", spoiled):
                yield
        else:
            hook = engine.parts.llm_engine.trained[0].register_hook(lambda grad: grad * factor)
            yield
            hook.remove()


def train(world: World, run: RunConfig, plan: dict[int, Any] | None = None) -> dict[str, Any]:
    """One run; what it did, as all ranks saw it."""
    spoiler = Spoiler(plan or {})
    error = ""
    with spoiler.planted():
        try:
            Training(run, world).execute()
        except TrainingError as stop:
            error = str(stop)
    own = {
        "losses": spoiler.losses,
        "skipped": spoiler.skipped,
        "changed": spoiler.changed_by_skipped,
    }
    return {
        "ranks": everywhere(own),
        "error": error,
        "samples": spoiler.samples,
        "before": spoiler.before,
        "states": spoiler.states,
    }


def scenario(job: StressJob, name: str, **sections: Any) -> RunConfig:
    """Settings of a run in a folder of its own."""
    run = settings_of(LAYOUTS[0], job, steps=STEPS, cuda=False)
    changes: dict[str, Any] = {
        "log": run.log.model_copy(update={"output": job.folder / name, "preview_steps": ()}),
        "optim": run.optim.model_copy(update={"schedule": "constant"}),
        "guards": run.guards.model_copy(
            update={"spike": "skip", "spike_window": 64} | sections.get("guards", {})
        ),
        "checkpoint": run.checkpoint.model_copy(
            update={"save_every": 0} | sections.get("checkpoint", {})
        ),
        "train": run.train.model_copy(update=sections.get("train", {})),
    }
    return run.model_copy(update=changes)


def everywhere(value: Any) -> list[Any]:
    """The value of each rank."""
    both: list[Any] = [None] * 2
    dist.all_gather_object(both, value)
    return both


def scenarios(world: World, job: StressJob) -> dict[str, Any]:
    """All runs by name."""
    results: dict[str, Any] = {"clean": train(world, scenario(job, "clean"))}
    nan = {5: ("loss", 1, NAN), 11: ("gradient", 0, NAN)}
    results["nan"] = train(world, scenario(job, "nan"), nan)
    in_a_row = dict.fromkeys((4, 6, 7, 8), ("loss", 0, NAN))
    results["stop"] = train(world, scenario(job, "stop"), in_a_row)
    spike = {24: ("loss", None, 60.0)}
    results["skip"] = train(world, scenario(job, "skip"), spike)
    results["taken"] = train(world, scenario(job, "taken", guards={"spike": "none"}), spike)
    saving = {"save_every": 10, "keep": 9}
    back = scenario(job, "back", guards={"spike": "rollback"}, checkpoint=saving)
    results["back"] = train(world, back, spike)
    states, before = results["back"]["states"], results["back"]["before"]
    results["back"]["after_rollback"] = everywhere(differing(before[25], states[19]))
    results["back"]["undone"] = everywhere(len(differing(before[25], states[23])))
    # Up to step 20, then the rest in a new session, which has seen no loss by itself.
    first = {"train": {"steps": 20}, "checkpoint": {"save_at_end": True}}
    train(world, scenario(job, "resumed", **first))
    if world.groups.rank == 0:
        shutil.copytree(job.folder / "resumed", job.folder / "forgetful")
    dist.barrier()
    early = {21: ("loss", None, 60.0)}
    results["resumed"] = train(world, scenario(job, "resumed"), early)
    with mock.patch.object(Guards, "restore", lambda self, state: None):
        results["forgetful"] = train(world, scenario(job, "forgetful"), early)
    return results


def main() -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = Path(os.environ["LAUNCH_FOLDER"])
    job = StressJob(folder / "job", (LAYOUTS[0],), steps=STEPS, seed=3, step_timeout_s=240)
    with open_world(scenario(job, "world"), device=torch.device("cpu")) as world:
        if world.groups.rank == 0:
            write_datasets(job.folder / "data")
            write_deepspeed_files(job)
        dist.barrier()
        results = scenarios(world, job)
        for result in results.values():
            del result["states"], result["before"]
        if world.groups.rank == 0:
            write_result(results)


if __name__ == "__main__":
    main()
