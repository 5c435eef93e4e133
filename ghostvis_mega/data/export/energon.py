"""A directory that megatron-energon 7 opens as it is: tars, their indexes, and .nv-meta.

The same tars as `export webdataset`, X.tar.idx (u64 offsets of the samples and of the end), and in
.nv-meta what `energon prepare` would write: .info.json, split.yaml, dataset.yaml (samples as plain
dictionaries, for a cooker), index.sqlite and index.uuid. The uuid comes from the content, so the
same dataset gives the same bytes.
"""

import json
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.files import EXPORT_FILE, new_directory
from ghostvis_mega.data.export.webdataset import (
    SHARD_BYTES,
    Progress,
    Shard,
    export_document,
    write_tars,
)
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import atomic_write, atomic_write_json

META = ".nv-meta"
ENERGON_VERSION = "7.4.1"
SPLITS = ("train", "val", "test")
_DATASET_YAML = """\
__module__: megatron.energon
__class__: CrudeWebdataset
"""
_TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL,
    sample_key TEXT NOT NULL UNIQUE,
    sample_index INTEGER NOT NULL,
    byte_offset INTEGER,
    byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER,
    sample_index INTEGER,
    part_name TEXT,
    content_byte_offset INTEGER,
    content_byte_size INTEGER
);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq
    ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(
    tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def _write_sqlite(path: Path, shards: list[Shard]) -> None:
    database = sqlite3.connect(path)
    try:
        database.executescript(_TABLES)
        for number, shard in enumerate(shards):
            database.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
                (
                    (number, sample.key, index, sample.offset, sample.end - sample.offset)
                    for index, sample in enumerate(shard.samples)
                ),
            )
            database.executemany(
                "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
                (
                    (number, index, member.part, member.offset, member.size)
                    for index, sample in enumerate(shard.samples)
                    for member in sample.members
                ),
            )
        database.executescript(_INDEXES)
        database.commit()
    finally:
        database.close()


def _write_meta(directory: Path, shards: list[Shard], dataset: Dataset, *, split: str) -> None:
    meta = directory / META
    meta.mkdir()
    counts = {shard.name: len(shard.samples) for shard in shards}
    atomic_write_json(
        meta / ".info.json", {"energon_version": ENERGON_VERSION, "shard_counts": counts}
    )
    parts = {name: list(counts) if name == split else [] for name in SPLITS}
    # JSON is YAML.
    splits = json.dumps({"split_parts": parts, "exclude": []}, indent=2) + "\n"
    atomic_write(meta / "split.yaml", splits.encode())
    atomic_write(meta / "dataset.yaml", _DATASET_YAML.encode())
    _write_sqlite(meta / "index.sqlite", shards)
    identity = uuid.uuid5(uuid.NAMESPACE_OID, f"{dataset.manifest.digest}/{list(counts.items())}")
    atomic_write(meta / "index.uuid", str(identity).encode())


def export_energon(
    dataset: Dataset,
    path: Path,
    *,
    split: str = "train",
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the directory `path`; returns the content of its export.json.

    Args:
        split: the one of energon's splits that holds all samples.

    Raises:
        DataError: `path` is taken, `split` is none of energon's, or the dataset is damaged.
    """
    if split not in SPLITS:
        raise DataError(f"energon has no split {split!r}: use {', '.join(SPLITS)}")
    with new_directory(path, force=force) as directory:
        shards = write_tars(dataset, directory, shard_bytes=shard_bytes, progress=progress)
        for shard in shards:
            ends = [sample.offset for sample in shard.samples] + [shard.samples[-1].end]
            index = np.array(ends, dtype="<u8").tobytes()
            atomic_write(directory / f"{shard.name}.idx", index)
        _write_meta(directory, shards, dataset, split=split)
        document = export_document(dataset, "energon", shards)
        atomic_write_json(directory / EXPORT_FILE, document)
    return document
