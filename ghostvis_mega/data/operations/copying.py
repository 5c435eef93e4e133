"""Copies samples of prepared datasets into new ones; every operation writes through here.

Tokens, spans, keys, answers and the encoded bytes of pictures are copied as they are; every crc and
content hash is checked on the way. A picture that several parents hold is stored once.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.layout import ImageFormat
from ghostvis_mega.data.manifest import REJECTS, Manifest, read_manifest
from ghostvis_mega.data.pixels import ImageInfo
from ghostvis_mega.data.template import Encoded
from ghostvis_mega.data.writer import DatasetWriter, content_hash
from ghostvis_mega.utils.errors import DataError

PROGRESS_EVERY = 10_000


@dataclass(frozen=True)
class Dropped:
    """A sample that is left out, for the ledger of the result."""

    index: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Piece:
    """Samples of one parent, in the order in which they are written."""

    dataset: Dataset
    indices: np.ndarray  # int64 [samples]
    dropped: tuple[Dropped, ...] = ()
    with_ledger: bool = False
    """The parent's ledger goes on in the result: for a parent that nobody keeps."""


@dataclass(frozen=True)
class Part:
    """One dataset to write: pieces end to end."""

    path: Path
    pieces: tuple[Piece, ...]
    operation: str = ""
    """What was done with which settings; goes into the manifest's sources."""

    @property
    def num_samples(self) -> int:
        """Samples of all pieces."""
        return sum(len(piece.indices) for piece in self.pieces)


@dataclass
class _Copier:
    """One part being written; remembers which pictures of which parent are stored."""

    part: Part
    writer: DatasetWriter
    first_source: list[int] = field(default_factory=list)
    known: list[dict[int, int]] = field(default_factory=list)

    def copy(self, number: int, index: int) -> None:
        """Write sample `index` of piece `number`."""
        dataset, known = self.part.pieces[number].dataset, self.known[number]
        sample = dataset.sample(index)
        for image_id in sample.image_ids:
            if image_id not in known:
                known[image_id] = self._copy_image(dataset, image_id)
        self.writer.add_sample(
            Encoded(sample.tokens, sample.spans, sample.image_positions),
            key=sample.key,
            answers=sample.answers,
            image_ids=[known[image_id] for image_id in sample.image_ids],
            source=self.first_source[number] + int(dataset.sample_index[index]["source"]),
        )

    def drop(self, number: int, dropped: Dropped) -> None:
        """Write one line of the ledger."""
        dataset = self.part.pieces[number].dataset
        key, _ = dataset.sample_key(dropped.index)
        source = int(dataset.sample_index[dropped.index]["source"])
        self.writer.reject(
            key=key,
            source=self.first_source[number] + source,
            reason=dropped.reason,
            detail=dropped.detail,
        )

    def copy_ledger(self, number: int) -> None:
        """Write the parent's ledger into that of the result."""
        dataset = self.part.pieces[number].dataset
        names = [source.name for source in dataset.manifest.sources]
        with open(dataset.path / REJECTS, encoding="ascii") as file:
            for line in file:
                row = json.loads(line)
                self.writer.reject(
                    key=row["key"],
                    source=self.first_source[number] + names.index(row["source"]),
                    reason=row["reason"],
                    detail=row["detail"],
                )

    def _copy_image(self, dataset: Dataset, image_id: int) -> int:
        data, record = dataset.image_bytes(image_id), dataset.image_index[image_id]
        if content_hash(data) != record["blake2b"].tobytes():
            raise DataError(
                f"{dataset.path}: image {image_id} does not match its content hash, so its record "
                "is damaged: run `python -m tools.preprocess verify` and ingest the data again"
            )
        return self.writer.add_image(data, image_info(record))


def image_info(record: np.void) -> ImageInfo:
    """What images.idx says about a picture."""
    return ImageInfo(
        format=ImageFormat(int(record["format"])),
        width=int(record["width"]),
        height=int(record["height"]),
        orientation=int(record["orientation"]),
        channels=int(record["channels"]),
        bits=int(record["mode"]),
    )


def check_compatible(datasets: Sequence[Dataset]) -> None:
    """Token ids mean the same in all datasets, or DataError with one sentence."""
    first = datasets[0]
    for other in datasets[1:]:
        mine, its = first.manifest.tokenizer.sha256, other.manifest.tokenizer.sha256
        if mine != its:
            raise DataError(
                f"{other.path} was made with another tokenizer ({its[:12]}...) than {first.path} "
                f"({mine[:12]}...), so its token ids mean other text: ingest it again with "
                f"--tokenizer {first.path / first.manifest.tokenizer.file}"
            )
        if other.manifest.template != first.manifest.template:
            raise DataError(
                f"{other.path} was made with the template {other.manifest.template.name!r}, "
                f"{first.path} with {first.manifest.template.name!r}: ingest one of them again"
            )


def _sources(part: Part) -> tuple[list[dict[str, str]], list[int]]:
    """Sources of the new manifest, one a source of a parent, and where each piece's begin."""
    described, first = [], []
    for piece in part.pieces:
        first.append(len(described))
        manifest = piece.dataset.manifest
        described += [
            {
                "name": source.name,
                "license": source.license,
                "parent": manifest.digest,
                "operation": part.operation,
            }
            for source in manifest.sources
        ]
    return described, first


def _check_parts(parts: Sequence[Part]) -> None:
    outputs = [part.path.resolve() for part in parts]
    if len(set(outputs)) != len(outputs):
        raise DataError("two parts have one name: give every part a directory of its own")
    for part in parts:
        check_compatible([piece.dataset for piece in part.pieces])
        if part.num_samples == 0:
            raise DataError(f"{part.path} would hold no sample: choose other settings")
        for piece in part.pieces:
            if piece.dataset.path.resolve() in outputs:
                raise DataError(
                    f"{piece.dataset.path} is read and cannot be written: give another name"
                )


def write_parts(
    parts: Sequence[Part],
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Manifest]:
    """Write all parts; an error leaves none of them, and each appears whole or not at all.

    Args:
        force: replace datasets that are there.
        progress: called with (samples written, samples in all) now and then.

    Raises:
        DataError: a name is taken or read from, a part would be empty, parents do not fit together,
            or a parent is damaged.
    """
    _check_parts(parts)
    total, done = sum(part.num_samples for part in parts), 0
    with ExitStack() as stack:
        for part in parts:
            described, first = _sources(part)
            writer = stack.enter_context(_writer(part, described, force=force))
            copier = _Copier(part, writer, first, [{} for _ in part.pieces])
            for number, piece in enumerate(part.pieces):
                if piece.with_ledger:
                    copier.copy_ledger(number)
                for index in piece.indices.tolist():
                    copier.copy(number, index)
                    done += 1
                    if progress is not None and (done % PROGRESS_EVERY == 0 or done == total):
                        progress(done, total)
                for dropped in piece.dropped:
                    copier.drop(number, dropped)
    return [read_manifest(part.path) for part in parts]


def _writer(part: Part, described: list[dict[str, str]], *, force: bool) -> DatasetWriter:
    dataset = part.pieces[0].dataset
    return DatasetWriter(
        part.path,
        tokenizer=dataset.tokenizer,
        template=dataset.manifest.template.name,
        sources=described,
        force=force,
    )


def part_summary(part: Part) -> dict[str, Any]:
    """Counts that a part will have, from the indexes alone."""
    tokens = trained = 0
    images: set[bytes] = set()
    for piece in part.pieces:
        records = piece.dataset.sample_index[piece.indices]
        tokens += int(records["tok_len"].sum(dtype=np.int64))
        trained += int(records["trained_len"].sum(dtype=np.int64))
        image_ids, _ = piece.dataset.image_ids(piece.indices)
        hashes = piece.dataset.image_index["blake2b"]
        images.update(hashes[image_id].tobytes() for image_id in np.unique(image_ids).tolist())
    return {
        "path": str(part.path),
        "samples": part.num_samples,
        "images": len(images),
        "tokens": tokens,
        "trained_tokens": trained,
    }
