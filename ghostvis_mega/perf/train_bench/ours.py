"""Our own training, timed: the loop that users run, without saves and observers."""

from pathlib import Path

import torch

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.memory import predict, unpredictable
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.train_bench.results import StepRecord
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.guards import Guards
from ghostvis_mega.train.loop import Loop
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary
from ghostvis_mega.train.observers.build import Observers
from ghostvis_mega.train.watchdog import Watchdog
from ghostvis_mega.utils.errors import TrainingError

_DATA = "data"
BETWEEN = "reductions and the rest"
"""What a step does outside of its timed sections."""


class _Newest:
    """Keeps what the loop says of the step before."""

    def __init__(self) -> None:
        self.metrics: StepMetrics | None = None

    def on_start(self, run: RunInfo) -> None: ...

    def on_step(self, m: StepMetrics) -> None:
        self.metrics = m

    def on_preview(self, step: int, previews: list[Preview]) -> None: ...

    def on_end(self, summary: Summary) -> None: ...


def told_memory(run: RunConfig, world_size: int, *, pictures: int) -> str:
    """What `memory.predict` says, to stand beside the measured peak.

    Args:
        run: Settings, `train.recompute` settled.
        world_size: Number of processes.
        pictures: Most that a rank encodes at a time.
    """
    if why := unpredictable(run, world_size=world_size):
        return f"not for {why}"
    mode = run.train.recompute
    assert mode != "auto", "the engine has settled it"
    need = predict(run, mode, world_size=world_size, pictures=pictures)
    return f"{need.total / 2**30:.1f} GiB of a GPU"


class OurTrainer:
    """The training loop, step by step.

    Args:
        run: Settings.
        groups: Of this rank.
        device: Of this rank.
        watchdog: Of this process.
    """

    def __init__(self, run: RunConfig, groups: Groups, *, device: torch.device, watchdog: Watchdog):
        feed = Feed(run, groups, Dataset.open(run.data.train))
        pictures = feed.most_pictures()
        engine = TrainEngine(run, groups, device=device, pictures=pictures)
        self._newest = _Newest()
        self._loop = Loop(
            engine=engine,
            feed=feed,
            observers=Observers((self._newest,)),
            watchdog=watchdog,
            previewer=None,
            save=lambda done: None,
            guards=Guards(run, places=groups.places, rank=groups.rank),
        )
        stages = sorted({f"ZeRO-{zero.stage}" for zero in engine.engines})
        self.description = {
            "layout": f"{groups.degrees.describe()}, {', '.join(stages)}",
            "layers": "Transformer Engine" if device.type == "cuda" else "PyTorch SDPA",
            "DeepSpeed": Path(run.deepspeed.llm).name,
            "recompute": engine.run.train.recompute,
            "memory predicted": told_memory(engine.run, len(groups.places), pictures=pictures),
            "precision": run.train.precision + ("" if run.train.fp8 == "none" else ", FP8 ")
            + ("" if run.train.fp8 == "none" else run.train.fp8),
        }  # fmt: skip

    def step(self, step: int) -> StepRecord:
        """Train on the batch of `step`.

        Raises:
            TrainingError: The step was left out.
        """
        fetched = self._loop.fetch(step)
        if fetched is None:
            raise TrainingError(f"step {step + 1} was not taken: the run was asked to stop")
        result = self._loop.take(step, fetched)
        if result.skipped:
            raise TrainingError(f"step {step + 1} was left out for {result.cause}")
        m = self._newest.metrics
        assert m is not None and m.step == step + 1, "the loop tells of each step it takes"
        sections = {name: value for name, value in m.timing.items() if name != _DATA}
        return StepRecord(
            loss=m.loss,
            tokens=m.tokens,
            trained_tokens=m.trained_tokens,
            images=m.images,
            flops_llm=m.flops_llm,
            flops_vision=m.flops_vision,
            data_s=fetched.data_s,
            sections=sections | {BETWEEN: m.other_s},
            imbalance=m.dispatch.get("imbalance"),
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self._loop.feed.close()
