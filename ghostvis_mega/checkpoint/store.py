"""Saves a run's state and resumes from it.

Every method is called by all ranks alike; what fails on one fails on all, with one sentence.
"""

import datetime
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from pydantic import JsonValue

from ghostvis_mega.checkpoint.capture import make_buffers, take_snapshot
from ghostvis_mega.checkpoint.folder import CheckpointFolder, open_complete
from ghostvis_mega.checkpoint.fp8_state import restore_fp8_state
from ghostvis_mega.checkpoint.layout import layout_change, layout_of, same_places
from ghostvis_mega.checkpoint.lease import Lease
from ghostvis_mega.checkpoint.random_state import restore_random_state
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.restore import (
    model_parameters,
    restore,
    restore_weights,
    resume_problems,
    weight_problems,
)
from ghostvis_mega.checkpoint.saving import Saved, write_checkpoint
from ghostvis_mega.checkpoint.snapshot import HostBuffers, Snapshot
from ghostvis_mega.checkpoint.together import on_every_rank, on_first_rank
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.train.progress import Progress
from ghostvis_mega.utils.errors import CheckpointError, DamagedCheckpointError, FolderTakenError
from ghostvis_mega.utils.files import canonical_json

log = logging.getLogger(__name__)

MAX_FAILED = 3
"""Saves in a row after whose failure a run stops: it would lose ever more."""
_WRITE_TIMEOUT = datetime.timedelta(hours=2)
"""How long ranks wait for the slowest one's disk."""


@dataclass(frozen=True)
class TrainState:
    """Where a resumed run goes on."""

    step: int
    """Optimizer steps done, so the number of the next one counted from 0."""
    sequences: int
    """Sequences consumed by them."""
    extra: dict[str, JsonValue]
    """What the caller gave to `save`."""


class CheckpointStore:
    """The checkpoints of one run.

    `save` returns when the checkpoint is on the disk. `begin` copies the state to host memory and
    leaves the rest to a thread; one save at a time, so that the next waits for the one before.

    Args:
        folder: Where they lie; every rank must see it under this name.
        keep: How many complete ones stay.
        lease: This launch's hold on the folder; None where no other launch can save there.
        progress: Told of every byte, and shown while anybody waits for them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        lease: Lease | None = None,
        progress: Progress | None = None,
    ):
        assert keep >= 1, "the newest checkpoint always stays"
        self.folder, self.keep, self.lease = CheckpointFolder(folder), keep, lease
        self.progress = progress or Progress()
        self.stall_s = 0.0
        """How long the last `begin` kept training, the wait for an earlier save left aside."""
        self.state_bytes = 0
        """What this rank writes of the last save that was begun."""
        self.saved: Saved | None = None
        """The last save that succeeded."""
        self._buffers: HostBuffers | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: Future[Saved] | None = None
        self._failed = 0
        self._resumed: Path | None = None
        self._first_serial = 0
        """What is saved from then on has it or a higher one."""

    def save(self, engine: TrainEngine, *, step: int, extra: dict[str, JsonValue]) -> Path:
        """Write everything that the run needs to go on exactly; collective.

        Args:
            engine: Between two steps.
            step: Optimizer steps done.
            extra: JSON values to get back from `load`; the first rank's are kept.

        Raises:
            CheckpointError: A rank could not write; older checkpoints are as they were.
        """
        self.wait()
        self.saved = self._write(self._snapshot(engine, step=step), extra=extra, group=None)
        return self.saved.path

    def _write(
        self,
        snapshot: Snapshot,
        *,
        extra: dict[str, JsonValue],
        group: dist.ProcessGroup | None,
    ) -> Saved:
        return write_checkpoint(
            self.folder,
            snapshot,
            extra=extra,
            keep=self.keep,
            group=group,
            lease=self.lease,
            progress=self.progress,
        )

    def group(self) -> dist.ProcessGroup | None:
        """All ranks once more, for what may wait for the slowest disk; made when first asked for;
        collective.

        What the thread says to its like must not get between the messages of training.
        """
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(
                backend="gloo", timeout=_WRITE_TIMEOUT, group_desc="checkpoints"
            )
        return self._group

    def prepare(self, engine: TrainEngine) -> None:
        """Take the host memory that saves need, before training; else the first one does;
        collective.

        Raises:
            CheckpointError: Some rank has no room for it.
        """
        if self._buffers is None:
            made: list[HostBuffers] = []
            on_every_rank(lambda: made.append(make_buffers(engine)), group=self.group())
            self._buffers = made[0]

    def begin(self, engine: TrainEngine, *, step: int, extra: dict[str, JsonValue]) -> None:
        """As `save`, but training goes on while the copy of the state is written; collective.

        A save that fails is a warning; it counts as failed when the next one begins.

        Raises:
            CheckpointError: `MAX_FAILED` saves in a row have failed, or (FolderTakenError) the
                folder belongs to another launch.
        """
        canonical_json(extra)
        self._collect()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        group = self.group()
        try:
            if self.lease is not None:
                # Here as well as in the thread: a launch that lost its folder trains no step more.
                on_first_rank(self.lease.check, group=group)
            began = time.perf_counter()
            snapshot = self._snapshot(engine, step=step)
        except FolderTakenError:
            raise
        except CheckpointError as error:
            # As if the thread had met it: a warning, unless it is the last save of the run.
            self._pending = Future()
            told = f"the checkpoint after step {step} could not be saved: {error}"
            self._pending.set_exception(CheckpointError(told))
            return
        self.stall_s = time.perf_counter() - began
        self.state_bytes = snapshot.num_bytes
        self._pending = self._thread.submit(self._write, snapshot, extra=extra, group=group)

    @property
    def writing(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Until everything that was begun is on the disk.

        Raises:
            CheckpointError: It could not be saved.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with self.progress.shown(awaits_save=True):
                self.saved = pending.result()
            self._failed = 0

    def _collect(self) -> None:
        """What became of the save before; the same on all ranks."""
        try:
            self.wait()
        except FolderTakenError:
            raise
        except CheckpointError as error:
            self._failed += 1
            if self._failed == MAX_FAILED:
                raise CheckpointError(
                    f"{MAX_FAILED} saves in a row have failed, the last with: {error}"
                ) from error
            log.warning("%s. Training goes on with the checkpoint before it", error)

    def _snapshot(self, engine: TrainEngine, *, step: int) -> Snapshot:
        self.prepare(engine)
        buffers, taken = self._buffers, list[Snapshot]()
        assert buffers is not None
        on_every_rank(
            lambda: taken.append(take_snapshot(engine, buffers, step=step)), group=self.group()
        )
        return taken[0]

    def close(self) -> None:
        """Wait for the thread and give its memory back.

        Raises:
            CheckpointError: The last save has failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            if self._buffers is not None:
                self._buffers.close()
                self._buffers = None

    def find(self, resume: str) -> Path | None:
        """The checkpoint to start from; collective once a process group exists.

        Args:
            resume: `auto` (the newest complete one of this folder, None if there never was one),
                `none`, or the path of one checkpoint.

        Raises:
            CheckpointError: The named checkpoint is missing or incomplete, or this folder holds
                only incomplete ones.
        """
        if resume == "none":
            return None
        if resume == "auto":
            return on_first_rank(self.folder.newest)
        return on_first_rank(lambda: _named(Path(resume)))

    def resume(self, wanted: str, engine: TrainEngine) -> TrainState | None:
        """Go on from the checkpoint that `checkpoint.resume` asks for; collective.

        Args:
            wanted: As for `find`. `auto` passes over checkpoints that turn out damaged.
            engine: Newly built.

        Returns:
            None where the run starts anew.

        Raises:
            CheckpointError: As `find` and `load`; also if no sound checkpoint is left.
        """
        self._collect()
        found = self._load_sound(
            lambda: self.find(wanted), engine, pass_over_damaged=wanted == "auto"
        )
        state, self._resumed = found or (None, self._resumed)
        self._first_serial = on_first_rank(self.folder.next_serial)
        return state

    def go_back(self, engine: TrainEngine) -> TrainState | None:
        """Return to the newest sound checkpoint that was saved since `resume`, else to the one that
        was resumed from; collective. Others in the folder are of other runs.

        Returns:
            None where there is none; nothing has changed then.

        Raises:
            CheckpointError: As `load`.
        """
        self._collect()
        found = self._load_sound(
            lambda: on_first_rank(self._newest_own), engine, pass_over_damaged=True
        )
        return found[0] if found else None

    def _load_sound(
        self, newest: Callable[[], Path | None], engine: TrainEngine, *, pass_over_damaged: bool
    ) -> tuple[TrainState, Path] | None:
        """Load what `newest` gives; asked again, it gives what is left without damaged ones."""
        while (path := newest()) is not None:
            try:
                return self.load(path, engine), path
            except DamagedCheckpointError as error:
                if not pass_over_damaged:
                    raise
                log.warning("%s. Falling back to the checkpoint before it", error)
                if path.parent == self.folder.path:
                    self.folder.damaged.add(path.name)
                if path == self._resumed:
                    self._resumed = None
        return None

    def _newest_own(self) -> Path | None:
        complete = self.folder.complete()
        if complete and complete[-1].manifest.serial >= self._first_serial:
            return complete[-1].path
        try:
            return open_complete(self._resumed).path if self._resumed is not None else None
        except CheckpointError as error:
            log.warning("the checkpoint that this run began with is gone: %s", error)
            return None

    def load(self, path: Path, engine: TrainEngine) -> TrainState:
        """Weights, optimizers and random generators become those that were saved; collective.

        All files are verified before a tensor reaches the model.

        Raises:
            DamagedCheckpointError: A file is missing or damaged.
            CheckpointError: The checkpoint is of another model, or of other batches.
        """
        group = self.group()
        with self.progress.shown(), _opened(path, moved=self.progress.moved) as reader:
            problems = resume_problems(engine, reader)
            _verify(reader, engine.groups, problems, reader.files(), group=group)
            restore(engine, reader, group=group)
            on_every_rank(lambda: _restore_own(engine, reader), group=group)
            manifest = reader.manifest
        log.info("resumed from %s after step %d", path, manifest.step)
        if change := layout_change(manifest.layout, layout_of(engine)):
            log.info("the layout is another one: %s", change)
        return TrainState(manifest.step, manifest.sequences, manifest.extra)


def _restore_own(engine: TrainEngine, reader: CheckpointReader) -> None:
    """What each rank keeps for itself.

    In another layout there is no such rank: the generators stay as a new run has them. Nothing in
    training draws from them; dropout and augmentation are functions of seed and step.
    """
    saved, rank = reader.manifest.layout, engine.groups.rank
    has_own = reader.random_file(rank) in reader.manifest.files
    if has_own and same_places(saved, layout_of(engine)):
        tensors, texts = reader.random_state(rank)
        if texts:  # `ckpt reshard` writes scales alone
            restore_random_state(tensors, texts)
        restore_fp8_state(engine.parts.chunks, tensors)
    elif engine.run.train.fp8 == "delayed":
        restore_fp8_state(engine.parts.chunks, reader.fp8_state(), of_all_ranks=True)


def load_weights(
    path: Path,
    engine: TrainEngine,
    *,
    modules: Sequence[str] | None = None,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[str, ...]:
    """Start from the weights of another run, of any layout, with fresh optimizers; collective.

    Args:
        path: A checkpoint.
        engine: Newly built.
        modules: Parts to take over; by default those that both the checkpoint and the model have.
        progress: Told of every byte, and shown meanwhile.
        group: Of all ranks, who wait in it for the slowest disk; by default the one of training.

    Returns:
        What was taken over; the log names the parts that stay freshly initialised.

    Raises:
        CheckpointError: A file is missing or damaged, a part is missing, or the parts that are
            taken over differ from the model's in their settings, their parameters or shapes.
    """
    own = engine.run.model.modules
    own_names = model_parameters(engine)
    told = progress or Progress()
    with told.shown(), _opened(path, moved=told.moved) as reader:
        saved = {info.module for info in reader.manifest.parameters.values()}
        wanted = [m for m in own if m in saved] if modules is None else modules
        problems = weight_problems(engine, reader, wanted, own_names=own_names)
        _verify(reader, engine.groups, problems, reader.files("weights"), group=group)
        restore_weights(engine, reader, wanted, group=group)
    chosen = tuple(module for module in own if module in wanted)
    suffix = ""
    if fresh := [module for module in own if module not in chosen]:
        suffix = f"; freshly initialised: {', '.join(fresh)}"
    if unused := sorted(saved - set(chosen)):
        suffix += f"; not taken over: {', '.join(unused)}"
    log.info("weights of %s from %s%s", ", ".join(chosen), path, suffix)
    return chosen


@contextmanager
def _opened(path: Path, *, moved: Callable[[int], None]) -> Iterator[CheckpointReader]:
    """The checkpoint, open on all ranks or on none; collective.

    Raises:
        CheckpointError: Some rank sees no sound manifest, or not the same as others: a file system
            may show old content for a while.
    """
    readers: list[CheckpointReader] = []

    def open_here() -> str:
        readers.append(CheckpointReader(path, moved=moved))
        return readers[0].manifest.digest

    digests = on_every_rank(open_here)
    with readers[0] as reader:
        if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise CheckpointError(
                f"{path} is not the same checkpoint on all ranks: {others} see another manifest "
                "than rank 0. Do all nodes see the same folder?"
            )
        yield reader


def _named(path: Path) -> Path:
    try:
        return open_complete(path).path
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.resume={path}: {error}.") from error


def _verify(
    reader: CheckpointReader,
    groups: Groups,
    problems: Iterator[str],
    files: list[str],
    *,
    group: dist.ProcessGroup | None,
) -> None:
    """Raise on all ranks if any found a problem; each file is read by one rank."""

    def check() -> list[str]:
        # The first of each: a wrong model or a missing disk has hundreds.
        if problem := next(problems, None):
            raise CheckpointError(problem)
        return reader.damage(files[groups.rank :: len(groups.places)])

    if damage := [sentence for found in on_every_rank(check, group=group) for sentence in found]:
        raise DamagedCheckpointError("; ".join(damage))
