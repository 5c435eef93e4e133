"""Saves a run's state and resumes from it.

Every method is called by all ranks alike; what fails on one fails on all, with one sentence.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ghostvis_mega.checkpoint.folder import CheckpointFolder, open_complete
from ghostvis_mega.checkpoint.fp8_state import restore_fp8_state
from ghostvis_mega.checkpoint.held import optimizer_steps
from ghostvis_mega.checkpoint.layout import (
    engine_name,
    layout_change,
    layout_of,
    same_places,
)
from ghostvis_mega.checkpoint.manifest import FileInfo, size_problem, write_manifest
from ghostvis_mega.checkpoint.random_state import restore_random_state
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.restore import (
    model_parameters,
    restore,
    restore_weights,
    resume_problems,
    weight_problems,
)
from ghostvis_mega.checkpoint.snapshot import parameter_entries, rank_files, write_rank_files
from ghostvis_mega.checkpoint.together import on_every_rank, on_first_rank
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json, fsync_directory

log = logging.getLogger(__name__)


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

    Args:
        folder: Where they lie; every rank must see it under this name.
        keep: How many complete ones stay.
    """

    def __init__(self, folder: Path, *, keep: int):
        assert keep >= 1, "the newest checkpoint always stays"
        self.folder, self.keep = CheckpointFolder(folder), keep

    def save(self, engine: TrainEngine, *, step: int, extra: dict[str, JsonValue]) -> Path:
        """Write everything that the run needs to go on exactly; collective.

        Args:
            engine: Between two steps.
            step: Optimizer steps done.
            extra: JSON values to get back from `load`; the first rank's are kept.

        Raises:
            CheckpointError: A rank could not write; older checkpoints are as they were.
        """
        began = time.perf_counter()
        canonical_json(extra)
        try:
            temporary = on_first_rank(lambda: self.folder.begin(step))
            written = on_every_rank(lambda: _write_own(engine, temporary))
            path = on_first_rank(lambda: self._finish(engine, written, step=step, extra=extra))
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint after step {step} could not be saved: {error}"
            ) from error
        if engine.groups.rank == 0:
            size = sum(entry["bytes"] for part in written for entry in part["files"].values())
            seconds = time.perf_counter() - began
            log.info("saved %s: %.1f MB in %.1f s", path, size / 1e6, seconds)
            self.folder.prune(self.keep)
        return path

    def _finish(
        self,
        engine: TrainEngine,
        written: Sequence[dict[str, Any]],
        *,
        step: int,
        extra: dict[str, JsonValue],
    ) -> Path:
        """The first rank's part: all files are on the disk, so the manifest may say so."""
        temporary = self.folder.temporary(step)
        document: dict[str, Any] = {
            "serial": self.folder.next_serial(),
            "step": step,
            "sequences": step * engine.run.batch.global_size,
            "layout": layout_of(engine),
            "optimizer_steps": {},
            "parameters": {},
            "files": {},
            "extra": extra,
            "versions": package_versions(),
        }
        for part in written:
            for section in ("optimizer_steps", "parameters", "files"):
                for key, value in part[section].items():
                    known = document[section].setdefault(key, value)
                    assert known == value, f"ranks disagree about {section}.{key}"
        for name, entry in document["files"].items():
            if problem := size_problem(temporary, name, FileInfo.model_validate(entry)):
                raise CheckpointError(f"{problem}: do all nodes see the same folder?")
        fsync_directory(temporary)
        write_manifest(temporary, document)
        return self.folder.publish(step)

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

    def load(self, path: Path, engine: TrainEngine) -> TrainState:
        """Weights, optimizers and random generators become those that were saved; collective.

        All files are verified before a tensor reaches the model.

        Raises:
            CheckpointError: A file is missing or damaged, or the checkpoint is of another model, or
                of other batches.
        """
        with _opened(path) as reader:
            _verify(reader, engine.groups, resume_problems(engine, reader), reader.files())
            restore(engine, reader)
            on_every_rank(lambda: _restore_own(engine, reader))
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
    if same_places(saved, layout_of(engine)) and reader.random_file(rank) in reader.manifest.files:
        tensors, texts = reader.random_state(rank)
        restore_random_state(tensors, texts)
        restore_fp8_state(engine.parts.chunks, tensors)
        return
    if engine.run.train.fp8 == "delayed":
        restore_fp8_state(engine.parts.chunks, reader.fp8_state(), of_all_ranks=True)


def load_weights(
    path: Path, engine: TrainEngine, *, modules: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Start from the weights of another run, of any layout, with fresh optimizers; collective.

    Args:
        path: A checkpoint.
        engine: Newly built.
        modules: Parts to take over; by default those that both the checkpoint and the model have.

    Returns:
        What was taken over; the log names the parts that stay freshly initialised.

    Raises:
        CheckpointError: A file is missing or damaged, a part is missing, or the parts that are
            taken over differ from the model's in their settings, their parameters or shapes.
    """
    own = engine.run.model.modules
    own_names = model_parameters(engine)
    with _opened(path) as reader:
        saved = {info.module for info in reader.manifest.parameters.values()}
        wanted = [m for m in own if m in saved] if modules is None else modules
        problems = weight_problems(engine, reader, wanted, own_names=own_names)
        _verify(reader, engine.groups, problems, reader.files("weights"))
        restore_weights(engine, reader, wanted)
    chosen = tuple(module for module in own if module in wanted)
    suffix = ""
    if fresh := [module for module in own if module not in chosen]:
        suffix = f"; freshly initialised: {', '.join(fresh)}"
    if unused := sorted(saved - set(chosen)):
        suffix += f"; not taken over: {', '.join(unused)}"
    log.info("weights of %s from %s%s", ", ".join(chosen), path, suffix)
    return chosen


@contextmanager
def _opened(path: Path) -> Iterator[CheckpointReader]:
    """The checkpoint, open on all ranks or on none; collective.

    Raises:
        CheckpointError: Some rank sees no sound manifest, or not the same as others: a file system
            may show old content for a while.
    """
    readers: list[CheckpointReader] = []

    def open_here() -> str:
        readers.append(CheckpointReader(path))
        return readers[0].manifest.digest

    digests = on_every_rank(open_here)
    with readers[0] as reader:
        if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise CheckpointError(
                f"{path} is not the same checkpoint on all ranks: {others} see another manifest "
                "than rank 0. Do all nodes see the same folder?"
            )
        yield reader


def _write_own(engine: TrainEngine, folder: Path) -> dict[str, Any]:
    place = engine.groups.place
    return {
        "files": write_rank_files(
            folder, rank_files(engine), rank=engine.groups.rank, tensor_rank=place.tensor
        ),
        "parameters": parameter_entries(engine),
        "optimizer_steps": {
            engine_name(engine, zero): optimizer_steps(zero) for zero in engine.engines
        },
    }


def _named(path: Path) -> Path:
    try:
        return open_complete(path).path
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.resume={path}: {error}.") from error


def _verify(
    reader: CheckpointReader, groups: Groups, problems: Iterator[str], files: list[str]
) -> None:
    """Raise on all ranks if any found a problem; each file is read by one rank."""

    def check() -> None:
        # The first of each: a wrong layout or a missing disk has hundreds.
        if problem := next(problems, None):
            raise CheckpointError(problem)
        share = files[groups.rank :: len(groups.places)]
        if damage := reader.damage(share):
            raise CheckpointError("; ".join(damage))

    on_every_rank(check)
