"""Weights of our own checkpoints as streams of bytes, whatever layout wrote them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from pydantic import JsonValue, ValidationError

from ghostvis_mega.checkpoint.manifest import size_problem
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.config.schema import ConnectorConfig, LLMConfig, VisionConfig
from ghostvis_mega.convert.block_reader import BlockReader, Buffer, Piece, loaded
from ghostvis_mega.convert.mapping import Entry, Parts
from ghostvis_mega.convert.tensor_file import (
    CHUNK_BYTES,
    CODES,
    DTYPES,
    TensorFile,
    TensorInfo,
    as_bytes,
    joined,
)
from ghostvis_mega.utils.closing import Closing
from ghostvis_mega.utils.errors import CheckpointError


class NativeWeights(Closing):
    """The weights of an open checkpoint; use it in a `with` statement.

    Args:
        path: Of the checkpoint.
        once: All of it is read: files that have a CRC-32 in blocks ahead of their use, of which
            `damage` knows those that were read already.

    Raises:
        CheckpointError: It is no sound checkpoint.
    """

    def __init__(self, path: Path, *, once: bool = False):
        self.path = path
        self._block_reader = BlockReader(crc=True) if once else None
        self.reader = CheckpointReader(path)
        self.manifest = self.reader.manifest
        self.parts = parts_of_layout(self.manifest.layout, path)
        self._files: dict[str, TensorFile] = {}
        self._lock = Lock()
        codes = {str(dtype).removeprefix("torch."): code for dtype, code in CODES.items()}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in self.manifest.parameters.items():
            if info.dtype not in codes:
                raise CheckpointError(f"{path}: {name} is {info.dtype}, which is no weight's type")
            self.tensors[name] = TensorInfo(codes[info.dtype], tuple(info.shape))

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.reader.close()
        if self._block_reader is not None:
            self._block_reader.close()
        while self._files:
            self._files.popitem()[1].close()

    @property
    def hf_vocab(self) -> int | None:
        """Rows of the vocabulary that are no padding; None without a language model."""
        return None if self.parts.llm is None else self.parts.llm.vocab_tokens

    def pieces(self, name: str, start: int, length: int) -> Iterator[Piece]:
        """Elements of a parameter, row-major in the whole of it."""
        info, count = self.manifest.parameters[name], self.reader.tensor_parts(name)
        if count == 1:
            yield from self._part(name, 0, start, length)
        elif info.partition_dim == 0:
            yield from self._rows(name, count, start, length)
        else:
            yield from self._columns(name, count, start, length)

    def chunks(self, name: str, start: int, length: int) -> Iterator[Buffer]:
        """The same as bytes, each piece valid until the next."""
        return loaded(self.pieces(name, start, length), size=CHUNK_BYTES)

    def _rows(self, name: str, count: int, start: int, length: int) -> Iterator[Piece]:
        """A parameter that ranks share by rows: each has a stretch of each stacked part."""
        info = self.manifest.parameters[name]
        stacked = prod(info.shape) // info.partition_parts
        each = stacked // count
        at = start
        while at < start + length:
            part, inside = divmod(at, stacked)
            rank, offset = divmod(inside, each)
            take = min(each - offset, start + length - at)
            yield from self._part(name, rank, part * each + offset, take)
            at += take

    def _columns(self, name: str, count: int, start: int, length: int) -> Iterator[Piece]:
        """A matrix that ranks share by columns: whole rows are put together, some at a time."""
        info = self.manifest.parameters[name]
        assert info.partition_dim == 1 and info.partition_parts == 1, f"{name} is cut in a new way"
        dtype = DTYPES[self.tensors[name].dtype]
        width = info.shape[1]
        assert start % width == 0 and length % width == 0, f"{name} is read by whole rows"
        step = max(1, CHUNK_BYTES // (width * dtype.itemsize))
        own = width // count
        for row in range(start // width, (start + length) // width, step):
            rows = min(step, (start + length) // width - row)
            pieces = []
            for rank in range(count):
                data = joined(self._part(name, rank, row * own, rows * own))
                pieces.append(torch.frombuffer(data, dtype=dtype).view(rows, own))
            yield as_bytes(torch.cat(pieces, dim=1))

    def _part(self, name: str, rank: int, start: int, length: int) -> Iterator[Piece]:
        """Elements of one tensor-parallel part."""
        size = self.tensors[name].item_bytes
        places = self.reader.places("weights", name, tensor_rank=rank, start=start, length=length)
        for place in places:
            file = self._file(place.file)
            found = file.tensors.get(name)
            if found is None or found.num_bytes != place.held * size:
                raise CheckpointError(
                    f"{self.path / place.file}: {name} does not have the {place.held} elements of "
                    f"{size} bytes that the manifest speaks of"
                )
            yield file.span(name, place.start * size, (place.start + place.length) * size)

    def _file(self, name: str) -> TensorFile:
        with self._lock:
            if name not in self._files:
                # For a SHA-256 the file is read a second time, front to back.
                plain = self.manifest.files[name].crc32 is None
                reader = None if plain else self._block_reader
                self._files[name] = TensorFile(self.path / name, reader=reader)
            return self._files[name]

    def damage(self, file: str) -> str | None:
        """A sentence if a file is not what the manifest says, all of it.

        A CRC-32, where there is one, shows accidents; `convert verify` compares SHA-256.
        """
        info = self.manifest.files[file]
        if not self.has_crc(file):
            return next(iter(self.reader.damage([file])), None)
        if problem := size_problem(self.path, file, info):
            return problem
        if (found := self._file(file).crc32()) != info.crc32:
            return f"{self.path / file} is damaged: its crc32 is {found:08x}, not {info.crc32:08x}"
        return None

    def has_crc(self, file: str) -> bool:
        """Whether `damage` takes the CRC-32 of what was read, and not a SHA-256 of all."""
        return self._block_reader is not None and self.manifest.files[file].crc32 is not None

    def check(self, entries: list[Entry], *, modules: set[str]) -> None:
        """Raise unless the mapping and the checkpoint speak of the same parameters of `modules`.

        Raises:
            CheckpointError: Names the parameter.
        """
        expected = {entry.native: entry for entry in entries}
        for name, info in self.manifest.parameters.items():
            if info.module in modules and name not in expected:
                raise CheckpointError(
                    f"{self.path} holds {name}, which has no name in this format: it would be lost"
                )
        for name, entry in expected.items():
            if name not in self.tensors:
                raise CheckpointError(f"{self.path} does not hold {name}, which the model has")
            if self.tensors[name].shape != entry.shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {list(self.tensors[name].shape)}, the model "
                    f"settings ask for {list(entry.shape)}"
                )


def parts_of_layout(layout: Mapping[str, JsonValue], path: Path) -> Parts:
    """The parts of a model from the fields `model.PART.KEY` of a checkpoint."""
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for field, value in layout.items():
        names = field.split(".")
        if names[0] == "model" and len(names) == 3:
            sections[names[1]][names[2]] = value
    kinds = {"llm": LLMConfig, "vision": VisionConfig, "connector": ConnectorConfig}
    try:
        return Parts(**{k: kinds[k].model_validate(v) for k, v in sections.items() if k in kinds})
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CheckpointError(
            f"{path}: the model settings in its manifest are broken at {where}"
        ) from error


def layout_of_parts(parts: Parts) -> dict[str, JsonValue]:
    """Fields of a checkpoint's manifest that say what the weights mean."""
    fields: dict[str, JsonValue] = {}
    for name in ("llm", "vision", "connector"):
        section = getattr(parts, name)
        if section is not None:
            values = section.model_dump(mode="json")
            fields |= {f"model.{name}.{k}": v for k, v in values.items() if k != "init_std"}
    return fields
