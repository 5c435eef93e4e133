"""One training run from its settings to its report: the place where all packages meet."""

import contextlib
import datetime
import logging
import math
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy
import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint.bundle import write_bundle
from ghostvis_mega.checkpoint.lease import Lease
from ghostvis_mega.checkpoint.lock import FolderLock
from ghostvis_mega.checkpoint.run_state import RunState
from ghostvis_mega.checkpoint.store import CheckpointStore
from ghostvis_mega.checkpoint.together import on_every_rank, on_first_rank
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.convert.online import Exporter
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.inspect import owned_parameters
from ghostvis_mega.engine.optimizer import module_of
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.eval.vqa import heldout_accuracy, question_only_accuracy
from ghostvis_mega.parallel.calls import CallWatch
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import Groups, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.parallel.trace import group_labels
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.goodput import LEDGER as GOODPUT_LEDGER
from ghostvis_mega.train.goodput import Goodput
from ghostvis_mega.train.guards import LEDGER as SKIPPED_LEDGER
from ghostvis_mega.train.guards import Guards
from ghostvis_mega.train.loop import Loop
from ghostvis_mega.train.observers import RunInfo, Summary
from ghostvis_mega.train.observers.build import make_observers
from ghostvis_mega.train.previews import Previewer
from ghostvis_mega.train.signals import StopRequest
from ghostvis_mega.train.slow_ranks import SlowRanks
from ghostvis_mega.train.watchdog import Watchdog
from ghostvis_mega.utils.determinism import determinism, make_deterministic
from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.errors import CheckpointError, ConfigError
from ghostvis_mega.utils.files import atomic_write_json
from ghostvis_mega.utils.hardware import cpu_name, device_peak
from ghostvis_mega.utils.processes import process_started

log = logging.getLogger(__name__)

_AFTER_WATCHDOG_S = 60.0
"""How much longer than the watchdog a collective waits."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    groups: Groups
    device: torch.device
    watchdog: Watchdog
    calls: CallWatch
    """Of this process to the others."""
    launch: str
    """Its name, the same on all ranks; no other launch has it."""


@contextlib.contextmanager
def open_world(run: RunConfig, *, device: torch.device) -> Iterator[World]:
    """Join the processes of this run, as `deepspeed`, `torchrun` or plain `python` started them."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if run.train.deterministic:
        make_deterministic()
    apply_cpu_shim()
    # DeepSpeed takes its place from the environment, which no launcher has set for plain `python`.
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cuda":
        if run.train.ranks_per_gpu > 1:
            os.environ |= sharing_environment(device, rank=rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        # A rank that hangs is named by the watchdog, which must come first.
        timeout=datetime.timedelta(seconds=run.train.timeout_s + _AFTER_WATCHDOG_S),
        # Started without a launcher there is nobody to meet.
        **({} if size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}),
    )
    # Nothing of ours draws from these; what does should do so alike in equal runs.
    random.seed(run.train.seed)
    numpy.random.seed(run.train.seed % 2**32)
    torch.manual_seed(run.train.seed)
    launch = _launch_name()
    with CallWatch() as calls:
        watchdog = Watchdog(
            timeout_s=run.train.timeout_s,
            rank=rank,
            world_size=size,
            folder=run.log.output / "hangs" / launch,
            calls=calls,
        )
        try:
            groups = build_groups(Degrees.of(run, world_size=size), seed=run.train.seed)
            calls.labels = group_labels(groups)
            yield World(groups=groups, device=device, watchdog=watchdog, calls=calls, launch=launch)
        finally:
            watchdog.close()
    # Not after an error: other ranks may still wait in a collective, and taking the groups down
    # would wait for them. The process ends, and its launcher ends the others.
    destroy_groups()
    dist.destroy_process_group()


def _launch_name() -> str:
    """A name for this launch; collective."""
    now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = [f"{now}-{os.getpid()}-{secrets.token_hex(2)}"]
    dist.broadcast_object_list(name, src=0)
    return name[0]


def local_device(run: RunConfig) -> torch.device:
    """The device of this process: its own GPU where there is CUDA, unless the run says
    otherwise."""
    available = torch.cuda.is_available()
    if run.train.device == "cuda" and not available:
        raise ConfigError(
            ["train.device=cuda, but this PyTorch sees no CUDA device. Install a CUDA build, check "
             "CUDA_VISIBLE_DEVICES, or set train.device=cpu."]
        )  # fmt: skip
    if run.train.device == "cpu" and available:
        raise ConfigError(
            ["train.device=cpu on a machine with a GPU: Megatron-Core would still put its buffers "
             "there. Hide the GPU for this run: CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu."]
        )  # fmt: skip
    if not available:
        return torch.device("cpu")
    found, share = torch.cuda.device_count(), run.train.ranks_per_gpu
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= found * share:
        raise ConfigError(
            [f"LOCAL_RANK={local}: {found} GPUs are visible, for {found * share} ranks of this "
             f"machine with train.ranks_per_gpu={share}. Start fewer ranks, check "
             f"CUDA_VISIBLE_DEVICES, or let ranks share: train.ranks_per_gpu={local // found + 1}."]
        )  # fmt: skip
    return torch.device("cuda", local // share)


def sharing_environment(device: torch.device, *, rank: int) -> dict[str, str]:
    """Variables of a rank that shares its GPU with others.

    NCCL refuses two ranks of one machine on one GPU. Told that they are of different machines
    (NCCL_HOSTID), it connects them through the network interface, the loopback if there is none
    else. DeepSpeed takes LOCAL_RANK for the number of the GPU.
    """
    return {
        "NCCL_HOSTID": f"{socket.gethostname()}-rank{rank}",
        "LOCAL_RANK": str(device.index),
    }


@dataclass
class Training:
    """Builds the parts of a run and runs it."""

    run: RunConfig
    world: World
    started: float = field(default_factory=time.time)
    """Unix time from which `seconds` in the summary counts."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Tells the run to save and to end before its last step."""

    def execute(self) -> Summary:
        """Train from the newest checkpoint or from scratch, evaluate if asked, report; returns the
        summary. A run that was told to stop has saved, and evaluates nothing.

        Raises:
            ConfigError: Another launch that lives has the run folder; nothing was touched there.
        """
        lock = FolderLock(self.run.log.output)
        if problem := on_first_rank(lock.take):
            raise ConfigError([problem])
        try:
            lease = Lease(self.run.log.output, launch=self.world.launch)
            on_first_rank(lease.take)
            return self._execute(lease)
        finally:
            lock.release()

    def _execute(self, lease: Lease) -> Summary:
        run, groups = self.run, self.world.groups
        goodput, alive = self.account(), self.world.watchdog.alive
        alive("building the model")
        train = Dataset.open(run.data.train)
        feed = Feed(run, groups, train)
        pictures = feed.most_pictures() if run.train.recompute == "auto" else None
        engine = TrainEngine(run, groups, device=self.world.device, pictures=pictures)
        heldout = Dataset.open(run.data.heldout) if run.data.heldout is not None else None
        store = CheckpointStore(
            run.log.output / "checkpoints",
            keep=run.checkpoint.keep,
            lease=lease,
            progress=self.world.watchdog.progress,
        )
        guards = Guards(run, places=groups.places, rank=groups.rank)
        state = RunState(store=store, engine=engine, feed=feed, guards=guards)
        alive("the restore")
        start = state.restore(run.checkpoint)
        if run.checkpoint.save_every or run.checkpoint.save_at_end:
            alive("taking host memory for saves")
            store.prepare(engine)
        alive("the start")
        observers = make_observers(run.log, rank=groups.rank, account=goodput.summary)
        previewer = None
        if heldout is not None and run.log.preview_steps and run.log.preview_samples:
            previewer = Previewer(engine, heldout, run)
        observers.on_start(self.describe(engine, start=start))
        loop = Loop(
            engine=engine,
            feed=feed,
            observers=observers,
            watchdog=self.world.watchdog,
            previewer=previewer,
            save=self.saving(state),
            guards=guards,
            slow_ranks=SlowRanks(
                run.guards, places=groups.places, rank=groups.rank, folder=run.log.output
            ),
            calls=self.world.calls,
            stop=self.stop,
            goodput=goodput,
            go_back=state.go_back,
            give_up=self.give_up,
        )
        if start >= run.train.steps:
            log.info("nothing left to train: %d of %d steps are done", start, run.train.steps)
        loss = loop.run(start=start)
        feed.close()
        alive("the end of the last save")
        with goodput.part("save"):
            store.close()
        summary: Summary = {"status": self.stop.reason if self.stop.agreed else "finished"}
        if loss is not None:
            summary["loss"] = loss
        if run.log.evaluate and heldout is not None and not self.stop.agreed:
            with goodput.part("evaluation"):
                summary |= self.evaluate(engine, train, heldout)
        summary["seconds"] = round(time.time() - self.started, 1)
        goodput.write()
        summary |= goodput.summary()
        observers.on_end(summary)
        if groups.rank == 0:
            self.write_summary(summary)
        return summary

    def write_summary(self, summary: Summary) -> None:
        """Keep it in the run folder, or, where that has no room, in the log."""
        path = self.run.log.output / "summary.json"
        try:
            atomic_write_json(path, dict(summary))
        except OSError as error:
            log.warning("%s cannot be written: %s. It would say %s", path, error, dict(summary))

    def saving(self, state: RunState) -> Callable[[int], None]:
        """What the loop calls to save, with the export that the settings ask for."""
        if self.run.checkpoint.export_hf == "none":
            return state.save
        exporter = Exporter(self.run)

        def save(steps: int) -> None:
            state.save(steps)
            if self.stop.agreed:
                return  # Its time may be short, and the next start exports.
            self.world.watchdog.alive("the Hugging Face export")
            try:
                exporter.save(state.engine, step=steps)
            except CheckpointError as error:
                if steps == self.run.train.steps:
                    raise
                log.warning("%s. Training goes on without it", error)

        return save

    def evaluate(self, engine: TrainEngine, train: Dataset, heldout: Dataset) -> Summary:
        """How many held-out questions the model answers, and how many a guess would."""
        alive = self.world.watchdog.alive
        accuracy = heldout_accuracy(engine, heldout, progress=alive)
        alive("the question-only accuracy")
        return {
            "heldout_accuracy": accuracy,
            "question_only_accuracy": question_only_accuracy(train, heldout),
            "num_questions": heldout.num_samples,
        }

    def account(self) -> Goodput:
        """The run's account of its time; the first rank keeps it in the run folder."""
        if self.world.groups.rank != 0:
            return Goodput(None)
        path = self.run.log.output / GOODPUT_LEDGER
        if self.run.checkpoint.resume == "none":
            path.unlink(missing_ok=True)  # another run's, which had this folder before
        return Goodput(path, started=process_started())

    def give_up(self, done: int) -> str:
        """Write down what explains the stop, on all ranks before any of them ends."""
        rank = self.world.groups.rank
        try:
            folder = on_every_rank(
                lambda: write_bundle(self.run, done=done, rank=rank, ledger=SKIPPED_LEDGER)
            )[0]
        except CheckpointError as error:
            log.warning("what explains this stop could not be written: %s", error)
            return ""
        return f"all there is to know is in {folder}"

    def describe(self, engine: TrainEngine, *, start: int) -> RunInfo:
        """What observers are told before the first step."""
        run, degrees, device = self.run, self.world.groups.degrees, self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        peak = (
            device_peak(name) if device.type == "cuda" and run.train.precision == "bf16" else None
        )
        stages = {type(zero.grid).__name__: zero.stage for zero in engine.engines}
        zero = ", ".join(f"ZeRO-{stage}" for stage in sorted(set(stages.values())))
        parameters = count_parameters(engine)
        told: RunInfo = {"determinism": determinism()} if run.train.deterministic else {}
        return told | {
            "total_steps": run.train.steps,
            "start_step": start,
            "name": run.log.output.name,
            "model": run.model.preset or "custom model",
            "parameters": parameters,
            "trained_parameters": sum(parameters[module] for module in run.trained_modules),
            "layout": f"{degrees.describe()}, {zero}",
            "device": name,
            "num_devices": math.ceil(degrees.world_size / run.train.ranks_per_gpu),
            "peak_flops": peak.bf16 if peak is not None else None,
            "precision": run.train.precision,
            "settings": run.model_dump(mode="json"),
            "versions": package_versions(),
        }


def count_parameters(engine: TrainEngine) -> dict[str, int]:
    """Parameters of the whole model by module; collective.

    A tied head counts once; a part that several ranks hold counts once.
    """
    groups = engine.groups
    counts = dict.fromkeys(engine.run.model.modules, 0)
    for name, parameter in owned_parameters(engine):
        module = module_of(name)
        if module != "llm":
            counts[module] += (
                parameter.numel() if not hasattr(parameter, "ds_numel") else parameter.ds_numel
            )
            continue
        copy = getattr(parameter, "ds_pipe_replicated", False)
        cut = getattr(parameter, "tensor_model_parallel", False)
        if not copy and (cut or groups.place.tensor == 0):
            counts["llm"] += getattr(parameter, "ds_numel", parameter.numel())
    total = torch.tensor(counts["llm"], dtype=torch.int64, device=engine.device)
    dist.all_reduce(total, group=groups.model)
    return counts | {"llm": int(total)}
