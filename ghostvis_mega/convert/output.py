"""Directories that appear whole or not at all, with sizes and SHA-256 of all that is in them."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ghostvis_mega.checkpoint.manifest import LARGEST_MANIFEST, MANIFEST_FILE
from ghostvis_mega.convert.block_reader import Piece
from ghostvis_mega.convert.hf_folder import INDEX, SINGLE, read_json
from ghostvis_mega.convert.tensor_file import (
    TensorFileWriter,
    TensorInfo,
    free_bytes,
    shards_of,
)
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import (
    atomic_write_json,
    canonical_json,
    fsync_directory,
    read_small,
    sha256_file,
)

EXPORT_FILE = "ghostvis_export.json"
SCHEMA = "gvhf/1"
SHARD_BYTES = 2_000_000_000
"""Small enough that several digests are taken side by side."""
WRITERS = 4
"""Files that are written, or read for their digests, side by side."""

Stream = Callable[[str], Iterator[Piece]]
"""The bytes of a tensor, by its name."""
Shard = tuple[str, list[tuple[str, TensorInfo]]]
"""File name and tensors in order."""


def check_target(path: Path, *, force: bool, sources: Sequence[Path]) -> None:
    """Refuse to replace a source, or anything but a checkpoint or an export, and that only with
    `force`.

    Raises:
        CheckpointError: Names the directory and what would be lost.
    """
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists already; name another directory or give --force")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file")
    target = _real(path)
    for source in sources:
        read = _real(source)
        if path.exists() and (target == read or target in read.parents or read in target.parents):
            raise CheckpointError(
                f"--force does not replace {path}, because {source} is read; name another directory"
            )
        for aside in _asides(target):
            # Whatever an interrupted run left there is deleted.
            if aside == read or aside in read.parents:
                raise CheckpointError(
                    f"{path} is written as {aside.name} first, which {source} is read from; name "
                    "another directory"
                )
    if path.exists() and any(path.iterdir()) and not _is_ours(path):
        raise CheckpointError(
            f"{path} is neither a checkpoint nor an export, so --force does not replace it: name "
            "another directory or remove it yourself"
        )


def _real(path: Path) -> Path:
    """Without links and dots: `.` has no name that another directory could be renamed to."""
    return Path(os.path.realpath(path))


def _asides(target: Path) -> tuple[Path, Path]:
    """Names beside a directory: of the new one while it grows, of the old one until it is gone."""
    return target.with_name(f"{target.name}.tmp"), target.with_name(f"{target.name}.replaced")


def _is_ours(folder: Path) -> bool:
    """Whether it is an export or a checkpoint, whole or damaged; a dataset has a manifest too."""
    if (folder / EXPORT_FILE).is_file():
        return True
    try:
        content = json.loads(read_small(folder / MANIFEST_FILE, limit=LARGEST_MANIFEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and str(content.get("schema")).startswith("gvc/")


@contextlib.contextmanager
def new_directory(path: Path, *, force: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error.

    Args:
        path: Of the directory.
        force: Replace a checkpoint or an export.
        sources: What the content is made from, which is never replaced.

    Raises:
        CheckpointError: `path` may not be replaced, or its parent cannot be written to.
    """
    check_target(path, force=force, sources=sources)
    target = _real(path)
    temporary, replaced = _asides(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            # An interrupted run left it; it was never complete.
            shutil.rmtree(temporary)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"{temporary} cannot be made: {error.strerror}") from error
    done = False
    try:
        yield temporary
        fsync_directory(temporary)
        if target.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.replace(target, replaced)
            os.replace(temporary, target)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, target)
        fsync_directory(target.parent)
        done = True
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)


def hf_shards(tensors: Mapping[str, TensorInfo], *, largest: int = SHARD_BYTES) -> list[Shard]:
    """Files and their tensors under transformers' names."""
    shards = shards_of(tensors, largest=largest)
    if len(shards) == 1:
        return [(SINGLE, shards[0])]
    count = len(shards)
    return [
        (f"model-{number:05d}-of-{count:05d}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    ]


def check_space(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise where the disk cannot hold the files.

    Raises:
        CheckpointError: Says how much is needed.
    """
    needed = sum(info.num_bytes for _, shard in shards for _, info in shard)
    if (free := free_bytes(folder)) < needed:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, the weights need {needed / 1e9:.1f} GB"
        )


def write_parallel(
    folder: Path, shards: Sequence[Shard], streams: Callable[[], Stream], *, crc: bool = False
) -> dict[str, Any]:
    """Write files side by side, each from a stream of its own; returns their sizes and digests."""
    check_space(folder, shards)
    workers = min(WRITERS, len(os.sched_getaffinity(0)), len(shards))

    def write(shard: Shard) -> tuple[str, dict[str, object]]:
        stream = streams()
        name, tensors = shard
        with TensorFileWriter(folder / name, tensors, crc=crc) as file:
            for tensor, _ in tensors:
                file.write(tensor, stream(tensor))
        return name, file.entry()

    with ThreadPoolExecutor(workers) as pool:
        return dict(pool.map(write, shards))


def write_ordered(
    folder: Path,
    shards: Sequence[Shard],
    tensors: Iterator[tuple[str, Iterator[Piece]]],
) -> dict[str, Any]:
    """As `write_parallel`, from one stream that brings the tensors in the order of the files."""
    check_space(folder, shards)
    entries = {}
    for name, content in shards:
        with TensorFileWriter(folder / name, content) as file:
            for due, _ in content:
                came, pieces = next(tensors)
                assert came == due, f"{came} came where {due} is due"
                file.write(came, pieces)
        entries[name] = file.entry()
    return entries


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of several files; a single one needs none."""
    if len(shards) == 1:
        return
    total = sum(info.num_bytes for _, shard in shards for _, info in shard)
    weight_map = {tensor: name for name, shard in shards for tensor, _ in shard}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_bytes(canonical_json(content))


def write_export_file(
    folder: Path, known: Mapping[str, Mapping[str, object]], about: Mapping[str, Any]
) -> None:
    """The last file: what the export is of, size and SHA-256 of all others.

    Args:
        folder: Everything else is in it.
        known: Entries of files whose digest is known; others are read.
        about: Where the weights are from.
    """
    files = {
        path.name: known.get(path.name)
        or {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    atomic_write_json(folder / EXPORT_FILE, {"schema": SCHEMA, **about, "files": files})


def export_damage(folder: Path) -> list[str]:
    """Sentences about files of an export that are missing or changed; reads all of them.

    Raises:
        CheckpointError: It is no export of ours.
    """
    found = []
    for name, (size, sha256) in _listed(folder).items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != size:
            found.append(f"{path} is damaged: it has {path.stat().st_size} bytes, not {size}")
        elif (digest := sha256_file(path)) != sha256:
            found.append(f"{path} is damaged: its sha256 is {digest[:12]}..., not {sha256[:12]}...")
    return found


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file of an export, as its list has them."""
    content = read_json(folder / EXPORT_FILE)
    files = content.get("files")
    if content.get("schema") != SCHEMA or not isinstance(files, dict):
        raise CheckpointError(f"{folder / EXPORT_FILE} is not of schema {SCHEMA}")
    listed = {}
    for name, entry in files.items():
        if Path(name).name != name or not name.isprintable():
            raise CheckpointError(f"{folder / EXPORT_FILE} lists the file {name!r}")
        told = entry if isinstance(entry, dict) else {}
        size, sha256 = told.get("bytes"), told.get("sha256")
        if not isinstance(size, int) or not isinstance(sha256, str):
            raise CheckpointError(
                f"{folder / EXPORT_FILE} lists {name} without its `bytes` and `sha256`"
            )
        listed[name] = size, sha256
    return listed
