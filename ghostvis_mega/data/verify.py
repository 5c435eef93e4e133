"""Compares a dataset with its manifest byte by byte, and on request decodes all of it."""

import tarfile
from pathlib import Path

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.layout import ImageFormat, shard_name
from ghostvis_mega.data.manifest import (
    MANIFEST_FILE,
    PLANS_DIRECTORY,
    Manifest,
    find_problems,
    read_manifest,
)
from ghostvis_mega.data.pixels import ImageError, probe
from ghostvis_mega.data.plan import read_plan
from ghostvis_mega.data.writer import content_hash
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import sha256_file

_CHUNK_SAMPLES = 4096


def verify_dataset(path: Path, *, deep: bool) -> list[str]:
    """Everything that is not as it was written, as sentences; empty if all is well.

    Args:
        deep: also read every sample, decode every image, and compare both with their records.
    """
    if problems := find_problems(path, what="dataset"):
        return problems
    manifest = read_manifest(path)
    problems = [
        f"{path / name}: its SHA-256 is not the manifest's: copy or ingest the dataset again"
        for name, info in manifest.files.items()
        if sha256_file(path / name) != info.sha256
    ]
    problems += _unlisted_files(path, manifest) + _plan_problems(path)
    if deep and not problems:
        with Dataset.open(path) as dataset:
            problems += _image_problems(dataset) + _sample_problems(dataset)
            problems += _tar_problems(dataset)
    return problems


def _unlisted_files(path: Path, manifest: Manifest) -> list[str]:
    known = {*manifest.files, MANIFEST_FILE}
    found = (file.relative_to(path) for file in sorted(path.rglob("*")) if not file.is_dir())
    return [
        f"{path / name} is not in the manifest: delete it"
        for name in found
        if name.as_posix() not in known and name.parts[0] != PLANS_DIRECTORY
    ]


def _plan_problems(path: Path) -> list[str]:
    problems = []
    for directory in sorted((path / PLANS_DIRECTORY).glob("*")):
        try:
            read_plan(directory)
        except DataError as error:
            problems.append(str(error))
    return problems


def _image_problems(dataset: Dataset) -> list[str]:
    problems = []
    for image_id, record in enumerate(dataset.image_index):
        where = f"{dataset.path}: image {image_id}"
        try:
            data = dataset.image_bytes(image_id)
            info = probe(data)
        except (ImageError, DataError) as error:
            problems.append(f"{where}: {error}")
            continue
        found = (info.format, info.width, info.height, info.orientation, info.channels)
        fields = ("format", "width", "height", "orientation", "channels")
        stored = tuple(int(record[field]) for field in fields)
        if stored != found:
            problems.append(f"{where}: its record says {stored}, its bytes say {found}")
        if content_hash(data) != record["blake2b"].tobytes():
            problems.append(f"{where}: its content hash is not its record's")
    return problems


def _sample_problems(dataset: Dataset) -> list[str]:
    """Reads every sample through the checks of `Dataset.gather`, and every key."""
    problems = []
    trained_len = dataset.sample_index["trained_len"]
    for start in range(0, dataset.num_samples, _CHUNK_SAMPLES):
        indices = np.arange(start, min(start + _CHUNK_SAMPLES, dataset.num_samples))
        try:
            data = dataset.gather(indices)
            for index in indices.tolist():
                dataset.sample_key(index)
        except DataError as error:
            problems.append(str(error))
            continue
        starts = np.cumsum(data.tok_lens) - data.tok_lens
        trained = np.add.reduceat(data.trained, starts) - data.trained[starts]
        wrong = np.flatnonzero(trained != trained_len[indices])
        problems += [
            f"{dataset.path}: sample {indices[place]}: its record counts other trained tokens"
            for place in wrong.tolist()
        ]
    return problems


def _tar_problems(dataset: Dataset) -> list[str]:
    """The shards are ordinary tars whose members are the images, in the order of their ids."""
    index = dataset.image_index
    problems = []
    for shard in np.unique(index["shard"]).tolist():
        path = dataset.path / shard_name(shard)
        image_ids = np.flatnonzero(index["shard"] == shard)
        names = [
            f"{image_id:08d}.{ImageFormat(int(index['format'][image_id])).extension}"
            for image_id in image_ids.tolist()
        ]
        try:
            with tarfile.open(path, "r:") as tar:
                members = tar.getmembers()
        except tarfile.TarError as error:
            problems.append(f"{path} is not a tar: {error}")
            continue
        expected = list(zip(names, index["offset"][image_ids].tolist(), strict=True))
        if [(member.name, member.offset_data) for member in members] != expected:
            problems.append(f"{path}: its members are not the images of the index")
        offsets = np.fromfile(path.with_name(path.name + ".idx"), dtype="<u8").tolist()
        if offsets[:-1] != [member.offset for member in members]:
            problems.append(f"{path}.idx does not point at the members of the tar")
    return problems
