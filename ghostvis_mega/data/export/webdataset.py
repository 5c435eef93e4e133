"""Tars of samples, one after another: KEY.jpg (or KEY.0.jpg, KEY.1.png, ...) and KEY.json.

KEY is the sample's number, so that it is unique, short and free of dots; the source's key is in the
JSON. Pictures are the original encoded bytes. USTAR only: every reader understands it.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.files import EXPORT_FILE, messages, new_directory
from ghostvis_mega.data.layout import ImageFormat
from ghostvis_mega.utils.files import HashingFile, atomic_write_json

SHARD_BYTES = 512 * 1024 * 1024
_BLOCK = tarfile.BLOCKSIZE
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Member:
    """One file of a sample in a tar; offset and size of its data in bytes."""

    part: str
    offset: int
    size: int


@dataclass(frozen=True)
class StoredSample:
    """Where a sample stands; offset is that of its first header."""

    key: str
    offset: int
    end: int
    members: tuple[Member, ...]


@dataclass
class Shard:
    """One finished tar."""

    name: str
    samples: list[StoredSample] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""


def sample_members(dataset: Dataset, index: int) -> Iterator[tuple[str, bytes]]:
    """(ending, data) of every file of a sample."""
    sample = dataset.sample(index)
    formats = dataset.image_index["format"]
    several = len(sample.image_ids) > 1
    names = []
    for number, image_id in enumerate(sample.image_ids):
        extension = ImageFormat(int(formats[image_id])).extension
        names.append(f"{number}.{extension}" if several else extension)
        yield names[-1], dataset.image_bytes(image_id)
    document = {
        "key": sample.key,
        "answers": list(sample.answers),
        "images": names,
        "messages": messages(dataset, sample),
    }
    yield "json", json.dumps(document, sort_keys=True).encode("ascii")


class _Tar:
    """A tar being written front to back."""

    def __init__(self, directory: Path, name: str):
        self.shard = Shard(name)
        self.file = HashingFile(directory / name)

    def add(self, key: str, files: Iterator[tuple[str, bytes]]) -> None:
        """Write all files of one sample."""
        start, members = self.file.size_bytes, []
        for part, data in files:
            header = tarfile.TarInfo(f"{key}.{part}")
            header.size, header.mode, header.mtime = len(data), 0o644, 0
            self.file.write(header.tobuf(tarfile.USTAR_FORMAT))
            members.append(Member(part, self.file.size_bytes, len(data)))
            self.file.write(data)
            self.file.write(bytes(-len(data) % _BLOCK))
        self.shard.samples.append(StoredSample(key, start, self.file.size_bytes, tuple(members)))

    def close(self) -> Shard:
        """End the archive."""
        self.file.write(bytes(2 * _BLOCK))
        self.file.close()
        self.shard.bytes, self.shard.sha256 = self.file.size_bytes, self.file.sha256
        return self.shard


def write_tars(
    dataset: Dataset, directory: Path, *, shard_bytes: int, progress: Progress | None
) -> list[Shard]:
    """Write all samples in order; a tar is closed when it holds `shard_bytes`."""
    shards: list[Shard] = []
    tar: _Tar | None = None
    try:
        for index in range(dataset.num_samples):
            if tar is None:
                tar = _Tar(directory, f"{len(shards):06d}.tar")
            tar.add(f"{index:09d}", sample_members(dataset, index))
            if tar.file.size_bytes >= shard_bytes:
                shards.append(tar.close())
                tar = None
            if progress is not None:
                progress(index + 1, dataset.num_samples)
        if tar is not None:
            shards.append(tar.close())
    finally:
        if tar is not None:
            tar.file.discard()
    return shards


def export_document(dataset: Dataset, fmt: str, shards: list[Shard]) -> dict[str, Any]:
    """Content of export.json."""
    return {
        "format": fmt,
        "dataset": dataset.manifest.digest,
        "samples": dataset.num_samples,
        "shards": {
            shard.name: {
                "samples": len(shard.samples),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }
            for shard in shards
        },
    }


def plan_tars(dataset: Dataset) -> dict[str, Any]:
    """What an export would write, from the index alone; bytes of pictures without headers."""
    flat, _ = dataset.image_ids(np.arange(dataset.num_samples))
    return {
        "samples": dataset.num_samples,
        "pictures": len(flat),
        "picture_bytes": int(dataset.image_index["size"][flat].sum(dtype=np.int64)),
    }


def export_webdataset(
    dataset: Dataset,
    path: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the directory `path`; returns the content of its export.json.

    Raises:
        DataError: `path` is taken, or the dataset is damaged.
    """
    with new_directory(path, force=force) as directory:
        shards = write_tars(dataset, directory, shard_bytes=shard_bytes, progress=progress)
        document = export_document(dataset, "webdataset", shards)
        atomic_write_json(directory / EXPORT_FILE, document)
    return document
