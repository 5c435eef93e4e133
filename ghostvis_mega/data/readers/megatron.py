"""Documents of Megatron's IndexedDataset (PREFIX.bin, PREFIX.idx): token ids, kept as they are.

Ids mean nothing without their tokenizer, so PREFIX.json must name its SHA-256, as `export megatron`
writes it: {"tokenizer": {"sha256": "..."}}. The index is checked whole before a token is read:
Megatron itself opens a cut file and fails, or reads other documents, later.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.data.export.megatron import DTYPES, INDEX_HEADER, INDEX_VERSION, MegatronFiles
from ghostvis_mega.data.ingest import TokenRow
from ghostvis_mega.data.readers.common import read_json
from ghostvis_mega.data.readers.meter import Meter
from ghostvis_mega.utils.errors import DataError

_HEAD = struct.Struct("<9sQBQQ")
_CUT = "it is cut or damaged: copy it again"


@dataclass(frozen=True)
class MegatronIndex:
    """A checked .idx: int64 [documents] first tokens and lengths."""

    dtype: np.dtype
    starts: np.ndarray
    lengths: np.ndarray


def read_index(files: MegatronFiles) -> MegatronIndex:
    """Read and check PREFIX.idx against PREFIX.bin.

    Raises:
        DataError: a file is missing, of another kind, cut, or contradicts the other.
    """
    try:
        data = files.idx.read_bytes()
        size = files.bin.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    if len(data) < _HEAD.size or data[: len(INDEX_HEADER)] != INDEX_HEADER:
        raise DataError(f"{files.idx} is no index of a Megatron dataset")
    _, version, code, sequences, documents = _HEAD.unpack_from(data)
    if version != INDEX_VERSION:
        raise DataError(f"{files.idx} has version {version}, this reads {INDEX_VERSION}")
    dtype = DTYPES.get(code)
    if dtype is None or dtype.kind not in "iu":
        raise DataError(f"{files.idx} has the type code {code}, which holds no token ids")
    body = sequences * 12 + documents * 8
    # One byte more for each sequence: the modes of multimodal data, which Megatron cannot read.
    if len(data) == _HEAD.size + body + sequences and sequences:
        raise DataError(f"{files.idx} has modes, so it is multimodal: only text is read")
    if len(data) != _HEAD.size + body:
        raise DataError(f"{files.idx} has {len(data)} bytes, expected {_HEAD.size + body}: {_CUT}")
    lengths = np.frombuffer(data, "<i4", sequences, _HEAD.size).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, _HEAD.size + 4 * sequences)
    ends = np.frombuffer(data, "<i8", documents, _HEAD.size + 12 * sequences)
    expected = (np.cumsum(lengths) - lengths) * dtype.itemsize
    if (lengths < 0).any() or not np.array_equal(pointers, expected):
        raise DataError(f"{files.idx}: its sequences do not follow one another, so {_CUT}")
    total = int(lengths.sum())
    if size != total * dtype.itemsize:
        raise DataError(
            f"{files.bin} has {size} bytes, its index says {total * dtype.itemsize}: {_CUT}"
        )
    if not len(ends) or ends[0] != 0 or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise DataError(f"{files.idx}: its documents do not cover its sequences, so {_CUT}")
    bounds = np.concatenate([[0], np.cumsum(lengths)])[ends]
    return MegatronIndex(dtype, bounds[:-1], np.diff(bounds))


def _check_tokenizer(files: MegatronFiles, sha256: str) -> None:
    """DataError unless PREFIX.json says that this tokenizer made the ids."""
    if not files.json.is_file():
        raise DataError(
            f"{files.json} is missing, so nothing says which tokenizer made the ids; if it is the "
            f'given one, write {{"tokenizer": {{"sha256": "{sha256}"}}}} into that file'
        )
    document: Any = read_json(files.json)
    tokenizer = document.get("tokenizer") if isinstance(document, dict) else None
    made = tokenizer.get("sha256") if isinstance(tokenizer, dict) else None
    if not isinstance(made, str):
        raise DataError(f"{files.json} has no text `tokenizer.sha256`")
    if made != sha256:
        raise DataError(
            f"{files.bin} was made with the tokenizer {made[:12]}..., the given one is "
            f"{sha256[:12]}..., so its ids would mean other text: give the first one, or ingest "
            "the text itself"
        )


def megatron_rows(
    prefix: Path,
    *,
    tokenizer_sha256: str,
    limit: int | None = None,
    meter: Meter | None = None,
) -> Iterator[TokenRow]:
    """Documents in order, each with all of its sequences joined.

    Raises:
        DataError: the files are damaged, or another tokenizer made the ids.
    """
    files = MegatronFiles.of(prefix)
    index = read_index(files)
    _check_tokenizer(files, tokenizer_sha256)
    width = index.dtype.itemsize
    meter = meter or Meter()
    meter.expect(len(index.starts))
    with open(files.bin, "rb") as file:
        places = zip(index.starts.tolist(), index.lengths.tolist(), strict=True)
        for number, (_, length) in enumerate(places):
            if limit is not None and number >= limit:
                return
            tokens = np.frombuffer(file.read(length * width), dtype=index.dtype)
            yield TokenRow(f"{files.bin.stem}/{number:06d}", tokens)
            meter.add(1)
