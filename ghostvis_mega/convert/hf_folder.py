"""Hugging Face directories as they lie on a disk: one or many safetensors files and their index."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostvis_mega.convert.block_reader import BlockReader, Piece
from ghostvis_mega.convert.source import Source
from ghostvis_mega.convert.tensor_file import TensorFile, TensorInfo
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import read_small

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        CheckpointError: The file is missing or is none.
    """
    try:
        value = json.loads(read_small(path).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also of UTF-8
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no mapping")
    return value


class HFFolder(Source):
    """The tensors of a directory; use it in a `with` statement.

    Args:
        path: Of the directory.
        once: All of it is read: in blocks ahead of their use.

    Raises:
        CheckpointError: A file is missing or broken, or a tensor is in two of them; names it.
    """

    def __init__(self, path: Path, *, once: bool = False):
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; download the model first")
        self._reader = BlockReader() if once else None
        self._files: dict[str, TensorFile] = {}
        self._file_of: dict[str, str] = {}
        try:
            for name in self._names():
                self._add(name)
            self._check_index()
        except CheckpointError:
            self.close()
            raise
        self.others = {name for file in self._files.values() for name in file.others}
        self.tensors: dict[str, TensorInfo] = {
            name: self._files[file].tensors[name] for name, file in self._file_of.items()
        }

    @property
    def settings_file(self) -> str:
        """Beside the weights."""
        return CONFIG

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.path / CONFIG)

    def _names(self) -> list[str]:
        single = (self.path / SINGLE).is_file()
        if (self.path / INDEX).is_file():
            names = self._indexed()
            if single and names != [SINGLE]:
                # transformers takes the single file, vLLM what the index lists.
                raise CheckpointError(
                    f"{self.path} holds {SINGLE} and {INDEX}, which lists {names[0]}: programs "
                    "read one or the other. Remove what is out of date"
                )
            return names
        if single:
            return [SINGLE]
        found = sorted(path.name for path in self.path.glob("*.safetensors"))
        if not found:
            raise CheckpointError(
                f"{self.path} holds no *.safetensors; weights in other formats are not read"
            )
        return found

    def _indexed(self) -> list[str]:
        """The files that the index lists."""
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.path / INDEX} holds no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        # An index may come from anywhere; it must not send us outside its directory. Neither NUL
        # nor half of a surrogate pair is in a file's name.
        sound = (n.isprintable() and "/" not in n and n.endswith(".safetensors") for n in names)
        if bad := [name for name, fine in zip(names, sound, strict=True) if not fine]:
            raise CheckpointError(f"{self.path / INDEX} lists the file {bad[0]!r}")
        return names

    def _add(self, name: str) -> None:
        file = self._files[name] = TensorFile(self.path / name, reader=self._reader)
        for tensor in file.tensors:
            if tensor in self._file_of:
                raise CheckpointError(
                    f"{self.path}: {tensor} is in {self._file_of[tensor]} and in {name}"
                )
            self._file_of[tensor] = name

    def _check_index(self) -> None:
        if not (self.path / INDEX).is_file():
            return
        for tensor, name in read_json(self.path / INDEX)["weight_map"].items():
            if self._file_of.get(tensor) != name and tensor not in self._files[name].others:
                raise CheckpointError(f"{self.path / INDEX} puts {tensor} into {name}, which "
                                      "does not hold it")  # fmt: skip

    def close(self) -> None:
        """Let go of the files."""
        if self._reader is not None:
            self._reader.close()
        while self._files:
            self._files.popitem()[1].close()

    def pieces(self, name: str, start: int, length: int) -> Iterator[Piece]:
        """Elements of a tensor as bytes of a file, which are read when they are needed."""
        size = self.tensors[name].item_bytes
        file = self._files[self._file_of[name]]
        yield file.span(name, start * size, (start + length) * size)
