"""The folder that holds a run's checkpoints: which are complete, which is newest, which go.

A checkpoint is written as `step-00001234.tmp` and renamed when its manifest is on the disk, so a
directory named `step-00001234` is complete unless somebody damaged it. `latest` names the newest
for people and scripts; we ourselves look at the manifests.
"""

import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.checkpoint.manifest import Manifest, read_manifest, size_problem
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import atomic_write, fsync_directory

log = logging.getLogger(__name__)

LATEST = "latest"
_COMPLETE = re.compile(r"step-([0-9]{8,})(\.replaced)?")
_LEFTOVER = re.compile(r"step-[0-9]{8,}(\.replaced)?\.tmp")


@dataclass(frozen=True)
class Found:
    """One complete checkpoint."""

    path: Path
    manifest: Manifest


def open_complete(path: Path) -> Found:
    """The checkpoint at `path`: its manifest is sound, its files are there in their right sizes.

    Raises:
        CheckpointError: It is not there, or not complete; names the file.
    """
    manifest = read_manifest(path)
    for name, info in manifest.files.items():
        if problem := size_problem(path, name, info):
            raise CheckpointError(problem)
    return Found(path, manifest)


def _of_its_name(found: Found) -> Found:
    """A directory that was swapped with another would take a run to another step."""
    match = _COMPLETE.fullmatch(found.path.name)
    assert match is not None
    if int(match[1]) != found.manifest.step:
        raise CheckpointError(f"{found.path} holds a checkpoint after step {found.manifest.step}")
    return found


class CheckpointFolder:
    """All operations are of one process; the first rank calls those that change something."""

    def __init__(self, path: Path):
        self.path = path
        self.damaged: set[str] = set()
        """Names of directories that turned out damaged although their sizes are right: they do not
        count."""

    def directory(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies."""
        return self.path / f"step-{step:08d}"

    def temporary(self, step: int) -> Path:
        """Where it is while it is written."""
        return self.path / f"step-{step:08d}.tmp"

    def candidates(self) -> list[Path]:
        """Directories that should be checkpoints, in order of their step."""
        return [path for _, path in self._named()]

    def last_step(self) -> int:
        """The highest step that has a checkpoint, going by the names alone, so that a run can be
        watched from outside while it writes and removes some; 0 without any."""
        return max((step for step, _ in self._named()), default=0)

    def _named(self) -> list[tuple[int, Path]]:
        if not self.path.is_dir():
            return []
        named = [(_COMPLETE.fullmatch(path.name), path) for path in self.path.iterdir()]
        return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())

    def complete(self) -> list[Found]:
        """Complete checkpoints, oldest save first; a damaged one is left out with a warning."""
        found = []
        for path in self.candidates():
            if path.name in self.damaged:
                continue
            try:
                found.append(_of_its_name(open_complete(path)))
            except CheckpointError as error:
                log.warning("%s is not used: %s", path.name, error)
        return sorted(found, key=lambda one: (one.manifest.serial, one.manifest.step))

    def newest(self) -> Path | None:
        """The checkpoint that was saved last; None if nothing was ever saved here.

        Raises:
            CheckpointError: There are checkpoints, but none is complete: starting anew would hide
                that a run was lost.
        """
        complete = self.complete()
        if complete:
            return complete[-1].path
        if broken := self.candidates():
            raise CheckpointError(
                f"{self.path} holds {len(broken)} checkpoints, but none is complete and sound; the "
                "warnings above say why. Set checkpoint.resume=none to start anew."
            )
        return None

    def begin(self, step: int, *, num_bytes: int = 0) -> Path:
        """An empty directory to write into; what interrupted saves left behind is removed.

        Args:
            step: Of the new checkpoint.
            num_bytes: What will be written.

        Raises:
            CheckpointError: The disk has less room than that.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            if _LEFTOVER.fullmatch(path.name) and path.is_dir():
                log.info("removing %s, left by an interrupted save", path)
                shutil.rmtree(path)
        if num_bytes > (free := shutil.disk_usage(self.path).free):
            raise CheckpointError(
                f"{self.path} needs {num_bytes / 1e9:.3f} GB for it and has {free / 1e9:.3f} GB "
                "left. Make room, or lower checkpoint.keep: one more than it names must fit"
            )
        temporary = self.temporary(step)
        temporary.mkdir()
        return temporary

    def discard(self, step: int) -> None:
        """Remove what a failed save has written, to give its room back."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def next_serial(self) -> int:
        """One more than any save here had, also those that are damaged: what a run falls back from
        must never look newer than what it saves next."""
        serials = []
        for path in self.candidates():
            try:
                serials.append(read_manifest(path).serial)
            except CheckpointError as error:
                log.debug("%s has no serial: %s", path.name, error)
        return max(serials, default=0) + 1

    def publish(self, step: int) -> Path:
        """Give a finished directory its name, then point `latest` to it."""
        temporary, final = self.temporary(step), self.directory(step)
        replaced = self.path / f"{final.name}.replaced"
        if final.exists():
            # A run that went back to an earlier step comes by a second time. Until the new
            # checkpoint has its name, the old one counts under another.
            if replaced.exists():
                self._delete(replaced)
            os.replace(final, replaced)
            self.damaged.discard(replaced.name)
            if final.name in self.damaged:
                self.damaged.add(replaced.name)
        os.replace(temporary, final)
        self.damaged.discard(final.name)  # that was the one before
        fsync_directory(self.path)
        atomic_write(self.path / LATEST, f"{final.name}\n".encode())
        if replaced.exists():
            self._delete(replaced)
            self.damaged.discard(replaced.name)
        return final

    def prune(self, keep: int) -> list[Path]:
        """Delete all complete checkpoints but the newest `keep`; returns what was deleted.

        Damaged ones do not count, so that as many sound ones stay. One that cannot be deleted
        stays, with a warning: it costs space but no work.
        """
        deleted = []
        for old in self.complete()[:-keep]:
            try:
                self._delete(old.path)
            except OSError as error:
                log.warning("%s could not be deleted: %s", old.path, error)
            else:
                deleted.append(old.path)
        return deleted

    def _delete(self, path: Path) -> None:
        """Renamed first: a half-deleted directory must not look like a checkpoint."""
        temporary = path.with_name(f"{path.name}.tmp")
        os.replace(path, temporary)
        # Else a power cut could take the new name back, and not the deletions.
        fsync_directory(self.path)
        shutil.rmtree(temporary)
