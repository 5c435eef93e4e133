"""Compares a dataset with its manifest byte by byte, and on request with what made it."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.manifest import (
    MANIFEST_FILE,
    PLANS_DIRECTORY,
    Manifest,
    find_problems,
    read_manifest,
    size_problems,
)
from ghostvis_mega.data.plan import PLAN_FILE, PackPlan, build_plan, read_plan
from ghostvis_mega.data.verify_deep import Progress, deep_problems
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import sha256_file


def _silent(what: str, done: int, total: int) -> None:
    """No progress is wanted."""


def verify_dataset(
    path: Path, *, deep: bool, progress: Progress = _silent, workers: int = 1
) -> list[str]:
    """Everything that is not as it was written, as sentences; empty if all is well.

    Any changed byte is found, and files that are missing, cut or should not be there.

    Args:
        deep: also decode every image, check every record and span, encode the text of some samples
            again, and make stored plans again.
        workers: threads that hash and decode; the result is the same.
    """
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return [f"dataset: {error}"]
    problems = size_problems(path, manifest)
    problems += _content_problems(path, manifest, progress, workers)
    problems += _unlisted_files(path, manifest) + _plan_problems(path, manifest)
    # Last, and only news: what keeps training from opening the dataset is mostly said by now.
    if not problems:
        problems = find_problems(path, what="dataset")
    if deep and not problems:
        with Dataset.open(path) as dataset:
            problems = deep_problems(dataset, progress=progress, workers=workers)
            problems += _stale_plans(dataset, progress)
    return problems


def _content_problems(
    path: Path, manifest: Manifest, progress: Progress, workers: int
) -> list[str]:
    """Files of the right size with other bytes."""
    problems = []
    total, done = sum(info.bytes for info in manifest.files.values()), 0
    present = [
        (path / name, info)
        for name, info in manifest.files.items()
        if (path / name).is_file() and (path / name).stat().st_size == info.bytes
    ]
    with ThreadPoolExecutor(workers) as pool:  # hashing lets other threads run
        digests = pool.map(sha256_file, [file for file, _ in present])
        for (file, info), digest in zip(present, digests, strict=True):
            if digest != info.sha256:
                problems.append(
                    f"{file}: its SHA-256 is not the manifest's: copy or ingest the dataset again"
                )
            done += info.bytes
            progress("bytes", done, total)
    return problems


def _unlisted_files(path: Path, manifest: Manifest) -> list[str]:
    known = {*manifest.files, MANIFEST_FILE}
    found = (file.relative_to(path) for file in sorted(path.rglob("*")) if not file.is_dir())
    return [
        f"{path / name} is not in the manifest: delete it"
        for name in found
        if name.as_posix() not in known and name.parts[0] != PLANS_DIRECTORY
    ]


def _plan_problems(path: Path, manifest: Manifest) -> list[str]:
    """Stored plans: every byte, nothing beside them, and made for this dataset."""
    problems = []
    for entry in sorted((path / PLANS_DIRECTORY).glob("*")):
        if not entry.is_dir():
            problems.append(f"{entry} is no plan: delete it")
            continue
        try:
            read_plan(entry)
        except DataError as error:
            problems.append(str(error))
            continue
        document = json.loads((entry / PLAN_FILE).read_bytes())
        if document["dataset"] != manifest.digest:
            problems.append(f"{entry} is the plan of another dataset: delete it")
        known = {PLAN_FILE, *document["files"]}
        # Reading takes a missing array for an empty one, and some are empty.
        problems += [
            f"{entry / name} is missing: delete {entry}, it is made again when needed"
            for name in document["files"]
            if not (entry / name).is_file()
        ]
        problems += [
            f"{file} is not part of the plan: delete it"
            for file in sorted(entry.rglob("*"))
            if not file.is_dir() and file.relative_to(entry).as_posix() not in known
        ]
    return problems


def _stale_plans(dataset: Dataset, progress: Progress) -> list[str]:
    """Stored plans that are not what planning gives; another planner version has another name."""
    problems = []
    directories = sorted((dataset.path / PLANS_DIRECTORY).glob("*"))
    for number, directory in enumerate(directories, 1):
        stored = read_plan(directory)
        if stored.params.digest(dataset) == directory.name:
            made = build_plan(dataset, stored.params)
            if not _same(stored, made):
                problems.append(f"{directory} is not the plan of its settings: delete it")
        progress("plans", number, len(directories))
    return problems


def _same(first: PackPlan, second: PackPlan) -> bool:
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name))
        for field in fields(PackPlan)
        if field.name != "params"
    )
