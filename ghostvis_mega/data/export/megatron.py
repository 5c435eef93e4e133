"""Text as Megatron's IndexedDataset: PREFIX.bin holds token ids, PREFIX.idx where documents begin.

A sample becomes one document of one sequence, with the template's tokens as they are stored.
PREFIX.json says which tokenizer and template made them; `ingest megatron` asks for it. The loss
mask has no place in this format: Megatron trains every token.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.webdataset import Progress
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import (
    HashingFile,
    atomic_write_json,
    fsync_directory,
    temporary_name,
)

INDEX_HEADER = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""Codes of the index; the float types are part of the format and never hold tokens."""
_UINT16_VOCAB = 65_500
_UINT16, _INT32 = 8, 4


@dataclass(frozen=True)
class MegatronFiles:
    """The three files of one prefix."""

    bin: Path
    idx: Path
    json: Path

    @classmethod
    def of(cls, prefix: Path) -> "MegatronFiles":
        """Files of `prefix`; the ending .bin or .idx may be there."""
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        return cls(*(prefix.with_name(prefix.name + end) for end in (".bin", ".idx", ".json")))


def index_bytes(code: int, lengths: np.ndarray, documents: np.ndarray) -> bytes:
    """The .idx of sequences of `lengths` tokens; `documents`: sequence numbers, 0 to the end."""
    pointers = (np.cumsum(lengths) - lengths) * DTYPES[code].itemsize
    head = INDEX_HEADER + struct.pack("<QBQQ", INDEX_VERSION, code, len(lengths), len(documents))
    return b"".join(
        (
            head,
            lengths.astype("<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            documents.astype("<i8").tobytes(),
        )
    )


def text_samples(dataset: Dataset, *, skip_images: bool) -> np.ndarray:
    """Indices of samples without pictures.

    Raises:
        DataError: there are pictures and `skip_images` is off, or nothing is left.
    """
    with_image = dataset.sample_index["n_images"] > 0
    count = int(np.count_nonzero(with_image))
    if count and not skip_images:
        raise DataError(
            f"{dataset.path}: {count} of {dataset.num_samples} samples have pictures, and "
            "Megatron's text format has no place for them: --skip-images leaves these samples out"
        )
    if count == dataset.num_samples:
        raise DataError(f"{dataset.path} holds no sample without pictures")
    return np.flatnonzero(~with_image)


def export_megatron(
    dataset: Dataset,
    prefix: Path,
    *,
    append_eod: bool = False,
    skip_images: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json; returns the content of the last.

    Args:
        append_eod: end each document with the tokenizer's end-of-text token.

    Raises:
        DataError: a file is there, the samples have pictures, or the dataset is damaged.
    """
    files = MegatronFiles.of(prefix)
    taken = [file for file in (files.bin, files.idx, files.json) if file.exists()]
    if taken and not force:
        raise DataError(f"{taken[0]} exists already: give another name, or --force to replace it")
    indices = text_samples(dataset, skip_images=skip_images)
    info = dataset.manifest.tokenizer
    end = []
    if append_eod:
        if "endoftext" not in info.specials:
            raise DataError(f"the tokenizer of {dataset.path} has no end-of-text token")
        end = [info.specials["endoftext"]]
    files.bin.parent.mkdir(parents=True, exist_ok=True)
    code = _UINT16 if info.vocab_size < _UINT16_VOCAB else _INT32
    lengths = dataset.sample_index["tok_len"][indices].astype(np.int64) + len(end)
    temporary = [temporary_name(file) for file in (files.bin, files.idx)]
    try:
        data = _write_tokens(dataset, indices, temporary[0], code, end, progress)
        index = HashingFile(temporary[1])
        index.write(index_bytes(code, lengths, np.arange(len(indices) + 1)))
        index.close()
        # The description comes last: without it the other two are not taken for whole.
        files.json.unlink(missing_ok=True)
        temporary[0].replace(files.bin)
        temporary[1].replace(files.idx)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)
    fsync_directory(files.bin.parent)
    document = {
        "format": "megatron",
        "dataset": dataset.manifest.digest,
        "tokenizer": {"sha256": info.sha256, "vocab_size": info.vocab_size},
        "template": dataset.manifest.template.name,
        "append_eod": append_eod,
        "documents": len(indices),
        "skipped_with_images": dataset.num_samples - len(indices),
        "tokens": int(lengths.sum()),
        "files": {
            "bin": {"bytes": data.size_bytes, "sha256": data.sha256},
            "idx": {"bytes": index.size_bytes, "sha256": index.sha256},
        },
    }
    atomic_write_json(files.json, document)
    return document


def _write_tokens(
    dataset: Dataset,
    indices: np.ndarray,
    path: Path,
    code: int,
    end: list[int],
    progress: Progress | None,
) -> HashingFile:
    """All tokens, sample after sample."""
    file = HashingFile(path)
    try:
        for number, index in enumerate(indices.tolist(), 1):
            tokens = np.concatenate([dataset.sample(index).tokens, np.array(end, dtype=np.int32)])
            file.write(tokens.astype(DTYPES[code]).tobytes())
            if progress is not None:
                progress(number, len(indices))
    finally:
        file.close()
    return file
