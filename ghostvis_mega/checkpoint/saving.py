"""From snapshots of all ranks to one complete checkpoint on the disk.

Every rank writes its files into `step-N.tmp`, brings them to the disk and reads them back; then the
first rank writes the manifest, renames the directory, points `latest` to it and deletes what is too
old. Whatever stops this half-way leaves all older checkpoints as they were.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import JsonValue

from ghostvis_mega.checkpoint.folder import CheckpointFolder
from ghostvis_mega.checkpoint.lease import Lease
from ghostvis_mega.checkpoint.manifest import (
    FileInfo,
    digest_problem,
    size_problem,
    write_manifest,
)
from ghostvis_mega.checkpoint.snapshot import Snapshot
from ghostvis_mega.checkpoint.tensors import write_buffer
from ghostvis_mega.checkpoint.together import on_every_rank, on_first_rank
from ghostvis_mega.utils.errors import CheckpointError, FolderTakenError
from ghostvis_mega.utils.files import fsync_directory

log = logging.getLogger(__name__)


def write_checkpoint(
    folder: CheckpointFolder,
    snapshot: Snapshot,
    *,
    extra: dict[str, JsonValue],
    keep: int,
    group: dist.ProcessGroup | None,
    lease: Lease | None = None,
) -> Path:
    """Write what all ranks have of one step; collective over `group`.

    Args:
        folder: Of the run.
        snapshot: Of this rank.
        extra: JSON values; the first rank's are kept.
        keep: Complete checkpoints that stay.
        group: Of all ranks; None takes the default one.
        lease: Must be ours before anything is removed and before the checkpoint gets its name.

    Raises:
        FolderTakenError: Another launch has the folder; what it saves there is as it was.
        CheckpointError: A rank could not write; older checkpoints are as they were.
    """
    began, step = time.perf_counter(), snapshot.step
    try:
        total = sum(on_every_rank(lambda: snapshot.num_bytes, group=group))
        temporary = on_first_rank(
            lambda: _begin(folder, step, num_bytes=total, lease=lease), group=group
        )
        written = on_every_rank(lambda: _write_own(snapshot, temporary), group=group)
        path = on_first_rank(
            lambda: _finish(folder, snapshot, written, extra=extra, keep=keep, lease=lease),
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
    if snapshot.rank == 0:
        size = sum(entry["bytes"] for part in written for entry in part["files"].values())
        seconds = time.perf_counter() - began
        log.info("saved %s: %.1f MB in %.1f s", path, size / 1e6, seconds)
    return path


def _begin(folder: CheckpointFolder, step: int, *, num_bytes: int, lease: Lease | None) -> Path:
    if lease is not None:
        lease.check()
    return folder.begin(step, num_bytes=num_bytes)


def _discard(folder: CheckpointFolder, step: int, *, lease: Lease | None) -> None:
    if lease is not None:
        lease.check()
    folder.discard(step)


def _write_own(snapshot: Snapshot, folder: Path) -> dict[str, Any]:
    """This rank's files and what it adds to the manifest."""
    entries = {}
    for name, content in snapshot.files.items():
        digest = write_buffer(folder / name, content)
        entries[name] = snapshot.entries[name] | {"sha256": digest}
    for name, entry in entries.items():
        _forget_cached(folder / name)
        if problem := digest_problem(folder, name, FileInfo.model_validate(entry)):
            raise CheckpointError(f"{problem}: the disk does not give back what was written")
    return {**snapshot.about, "files": entries}


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
    written: Sequence[dict[str, Any]],
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
        for section, entries in part.items():
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
