"""From snapshots of all ranks to one complete checkpoint on the disk.

Every rank writes its files into `step-N.tmp`, brings them to the disk and reads them back; then the
first rank writes the manifest, renames the directory, points `latest` to it and deletes what is too
old. Whatever stops this half-way leaves all older checkpoints as they were.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import JsonValue

from ghostvis_mega.checkpoint.folder import CheckpointFolder
from ghostvis_mega.checkpoint.lease import Lease
from ghostvis_mega.checkpoint.manifest import (
    FileInfo,
    size_problem,
    write_manifest,
)
from ghostvis_mega.checkpoint.snapshot import Snapshot
from ghostvis_mega.checkpoint.tensors import differs, write_buffer
from ghostvis_mega.checkpoint.together import on_every_rank, on_first_rank
from ghostvis_mega.train.progress import Progress
from ghostvis_mega.utils.errors import CheckpointError, FolderTakenError
from ghostvis_mega.utils.files import fsync_directory

log = logging.getLogger(__name__)

_DIGEST_THREADS = 2
"""A rank has one or two large files."""
_PIECE_BYTES = 64 << 20
"""Hashed at once."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has its name, and what it took, on the slowest rank where they differ."""

    path: Path
    seconds: float
    """From the first file to the name."""
    hashing_s: float
    """Processor time of threads beside the one that writes, for SHA-256."""
    waited_s: float
    """Of `seconds`, the wait for these threads when all else was done."""


class Part(NamedTuple):
    """What one rank has written."""

    manifest: dict[str, Any]
    """What it adds to the manifest, by section."""
    hashing_s: float = 0.0
    waited_s: float = 0.0


def write_checkpoint(
    folder: CheckpointFolder,
    snapshot: Snapshot,
    *,
    extra: dict[str, JsonValue],
    keep: int,
    group: dist.ProcessGroup | None,
    lease: Lease | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Write what all ranks have of one step; collective over `group`.

    Args:
        folder: Of the run.
        snapshot: Of this rank.
        extra: JSON values; the first rank's are kept.
        keep: Complete checkpoints that stay.
        group: Of all ranks; None takes the default one.
        lease: Must be ours before anything is removed and before the checkpoint gets its name.
        progress: Told what this rank does and of every byte.

    Raises:
        FolderTakenError: Another launch has the folder; what it saves there is as it was.
        CheckpointError: A rank could not write; older checkpoints are as they were.
    """
    began, step = time.perf_counter(), snapshot.step
    told = progress or Progress()
    try:
        total = sum(on_every_rank(lambda: snapshot.num_bytes, group=group))
        temporary = on_first_rank(
            told.at("makes room")(lambda: _begin(folder, step, num_bytes=total, lease=lease)),
            group=group,
        )
        written = on_every_rank(lambda: _write_own(snapshot, temporary, told), group=group)
        path = on_first_rank(
            told.at("names the checkpoint and deletes old ones")(
                lambda: _finish(folder, snapshot, written, extra=extra, keep=keep, lease=lease)
            ),
            group=group,
        )
    except FolderTakenError:
        raise
    except CheckpointError as error:
        # A launch that takes the folder over removes what is half-written there, which looks like
        # a broken disk, and may already write under the same name.
        on_first_rank(lambda: _discard(folder, step, lease=lease), group=group)
        raise CheckpointError(
            f"the checkpoint after step {step} could not be saved: {error}"
        ) from error
    seconds = time.perf_counter() - began
    if snapshot.rank == 0:
        size = sum(e["bytes"] for part in written for e in part.manifest["files"].values())
        log.info("saved %s: %.1f MB in %.1f s", path, size / 1e6, seconds)
    return Saved(
        path,
        seconds,
        hashing_s=max(part.hashing_s for part in written),
        waited_s=max(part.waited_s for part in written),
    )


def _begin(folder: CheckpointFolder, step: int, *, num_bytes: int, lease: Lease | None) -> Path:
    if lease is not None:
        lease.check()
    return folder.begin(step, num_bytes=num_bytes)


def _discard(folder: CheckpointFolder, step: int, *, lease: Lease | None) -> None:
    if lease is not None:
        lease.check()
    folder.discard(step)


def _write_own(snapshot: Snapshot, folder: Path, progress: Progress) -> Part:
    """This rank's files and what it adds to the manifest.

    Digests are taken of the host memory, by threads that need not keep pace with the disk: what
    they have left to do when it is done is all that they cost.
    """
    with ThreadPoolExecutor(_DIGEST_THREADS, thread_name_prefix="digest") as pool:
        moved = progress.moved
        digests = {
            name: pool.submit(_digest, content, moved=moved)
            for name, content in snapshot.files.items()
        }
        for name, content in snapshot.files.items():
            with progress.at(f"writes {name}"):
                write_buffer(folder / name, content, moved=moved)
        for name, content in snapshot.files.items():
            with progress.at(f"reads back {name}"):
                _forget_cached(folder / name)
                if differs(folder / name, content, moved=moved):
                    raise CheckpointError(
                        f"{folder / name} is damaged: the disk does not give back what was written"
                    )
        on_disk = time.perf_counter()
        with progress.at("takes digests"):
            done = {name: digest.result() for name, digest in digests.items()}
        waited_s = time.perf_counter() - on_disk
    files = {name: snapshot.entries[name] | {"sha256": done[name][0]} for name in done}
    hashing_s = sum(seconds for _, seconds in done.values())
    return Part({**snapshot.about, "files": files}, hashing_s=hashing_s, waited_s=waited_s)


def _digest(content_B: torch.Tensor, *, moved: Callable[[int], None]) -> tuple[str, float]:
    """Hex SHA-256, and the processor seconds that it took."""
    began, digest = time.thread_time(), hashlib.sha256()
    for piece_B in content_B.split(_PIECE_BYTES):
        digest.update(piece_B.numpy())
        moved(len(piece_B))
    return digest.hexdigest(), time.thread_time() - began


def _forget_cached(path: Path) -> None:
    """Let the next reader go to the disk and not to what the system remembers of the write."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _finish(
    folder: CheckpointFolder,
    snapshot: Snapshot,
    written: Sequence[Part],
    *,
    extra: dict[str, JsonValue],
    keep: int,
    lease: Lease | None,
) -> Path:
    """The first rank's part: all files are on the disk, so the manifest may say so."""
    temporary = folder.temporary(snapshot.step)
    document: dict[str, Any] = {
        "serial": folder.next_serial(),
        "step": snapshot.step,
        **snapshot.shared,
        "optimizer_steps": {},
        "parameters": {},
        "files": {},
        "extra": extra,
    }
    for part in written:
        for section, entries in part.manifest.items():
            for key, value in entries.items():
                known = document[section].setdefault(key, value)
                assert known == value, f"ranks disagree about {section}.{key}"
    for name, entry in document["files"].items():
        if problem := size_problem(temporary, name, FileInfo.model_validate(entry)):
            raise CheckpointError(f"{problem}: do all nodes see the same folder?")
    fsync_directory(temporary)
    write_manifest(temporary, document)
    if lease is not None:
        lease.check()
    path = folder.publish(snapshot.step)
    folder.prune(keep)
    return path
