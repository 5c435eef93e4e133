"""What all exports share: directories that are whole or absent, and samples as plain messages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghostvis_mega.data.dataset import Dataset, Sample
from ghostvis_mega.data.layout import Role
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import fsync_directory, temporary_name

EXPORT_FILE = "export.json"
"""Stands in every exported directory: where it came from, and sizes and digests of its files."""


def check_target(path: Path, *, force: bool) -> None:
    """Refuse to replace anything but an earlier export, and that only with `force`."""
    if not path.exists():
        return
    if not force:
        raise DataError(f"{path} exists already: give another name, or --force to replace it")
    if not (path / EXPORT_FILE).is_file():
        raise DataError(
            f"{path} holds no {EXPORT_FILE}, so --force does not replace it: remove it yourself"
        )


@contextmanager
def new_directory(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary directory that becomes `path` if the block ends well, and vanishes if not."""
    check_target(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    done = False
    try:
        yield temporary
        done = True
    finally:
        if not done:
            shutil.rmtree(temporary)
    fsync_directory(temporary)
    old = None
    if path.exists():
        old = temporary.with_name(temporary.name + "-old")
        os.replace(path, old)
    os.replace(temporary, path)
    fsync_directory(path.parent)
    if old is not None:
        shutil.rmtree(old)


def _content(dataset: Dataset, sample: Sample, start: int, end: int) -> list[dict[str, Any]]:
    """Text and places of pictures of one turn, in reading order."""
    parts: list[dict[str, Any]] = []

    def add_text(begin: int, stop: int) -> None:
        if stop > begin:
            text = dataset.tokenizer.decode(sample.tokens[begin:stop].tolist())
            parts.append({"type": "text", "text": text})

    for number, position in enumerate(sample.image_positions):
        if start <= position < end:
            add_text(start, position)
            parts.append({"type": "image", "index": number})
            start = position + 1
    add_text(start, end)
    return parts


def messages(dataset: Dataset, sample: Sample) -> list[dict[str, Any]]:
    """A sample as [{"role", "content": [{"type": "text", "text"} or {"type": "image", "index"}]}].

    Pictures have places of their own, so text that looks like a placeholder stays text.
    """
    turns = sample.spans[(sample.spans["role"] != Role.EOS) & (sample.spans["role"] != Role.IMAGE)]
    return [
        {
            "role": Role(int(span["role"])).name.lower(),
            "content": _content(
                dataset, sample, int(span["start"]), int(span["start"]) + int(span["len"])
            ),
        }
        for span in turns
    ]
