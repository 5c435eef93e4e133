"""Hugging Face directories as they lie on a disk: one or many safetensors files and their index."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostvis_mega.convert.direct_file import Span
from ghostvis_mega.convert.mapping import Entry, Parts, entries
from ghostvis_mega.convert.table import IGNORED, LAYOUTS, Layout
from ghostvis_mega.convert.tensor_file import CHUNK_BYTES, TensorFile, TensorInfo
from ghostvis_mega.utils.closing import Closing
from ghostvis_mega.utils.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        CheckpointError: The file is missing or is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also of UTF-8
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no mapping")
    return value


class HFFolder(Closing):
    """The tensors of a directory; use it in a `with` statement.

    Raises:
        CheckpointError: A file is missing or broken, or a tensor is in two of them; names it.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; download the model first")
        self._files: dict[str, TensorFile] = {}
        self._file_of: dict[str, str] = {}
        try:
            for name in self._names():
                self._add(name)
            self._check_index()
        except CheckpointError:
            self.close()
            raise
        self.tensors: dict[str, TensorInfo] = {
            name: self._files[file].tensors[name] for name, file in self._file_of.items()
        }

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.path / CONFIG)

    def _names(self) -> list[str]:
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.path / INDEX} holds no weight_map")
            names = sorted({str(name) for name in weight_map.values()})
            # An index may come from anywhere; it must not send us outside its directory.
            if bad := [name for name in names if "/" in name or not name.endswith(".safetensors")]:
                raise CheckpointError(f"{self.path / INDEX} lists the file {bad[0]!r}")
            return names
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        found = sorted(path.name for path in self.path.glob("*.safetensors"))
        if not found:
            raise CheckpointError(
                f"{self.path} holds no *.safetensors; weights in other formats are not read"
            )
        return found

    def _add(self, name: str) -> None:
        file = self._files[name] = TensorFile(self.path / name)
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
        for file in self._files.values():
            file.close()

    def span(self, name: str, start: int, length: int) -> Span:
        """Elements of a tensor."""
        size = self.tensors[name].item_bytes
        file = self._files[self._file_of[name]]
        return file.span(name, start * size, (start + length) * size)

    def chunks(self, name: str, start: int, length: int) -> Iterator[memoryview]:
        """The same as bytes, piece by piece; a piece is valid until the next."""
        return self.span(name, start, length).chunks(CHUNK_BYTES)

    def tensor(self, name: str) -> Any:
        """A copy of one tensor."""
        return self._files[self._file_of[name]].tensor(name)

    def find_layout(self, parts: Parts) -> tuple[Layout, list[Entry]]:
        """The layout whose names are here, and the mapping to it.

        Raises:
            CheckpointError: No layout has all names, or there are others; names the tensor.
        """
        best: tuple[int, Layout, list[Entry]] | None = None
        for layout in LAYOUTS.values():
            found = entries(parts, layout)
            names = {tensor.name for entry in found for tensor in entry.hf}
            score = len(names & self.tensors.keys())
            if best is None or score > best[0]:
                best = (score, layout, found)
        assert best is not None
        _, layout, found = best
        self._check_names(layout, found, tied=parts.llm is not None and parts.llm.tied_embeddings)
        return layout, found

    def _check_names(self, layout: Layout, found: list[Entry], *, tied: bool) -> None:
        names = {tensor.name: tensor.shape for entry in found for tensor in entry.hf}
        for name in names:
            if name not in self.tensors:
                hint = " (tie_word_embeddings is false)" if name == layout.head else ""
                if any(name in file.others for file in self._files.values()):
                    hint = " as a floating-point tensor"
                raise CheckpointError(f"{self.path} lacks {name}, which config.json asks for{hint}")
        ignored = tuple(
            part.format(
                llm="\0" if layout.llm is None else layout.llm,
                tower="\0" if layout.tower is None else layout.tower,
            )
            for part in IGNORED
        )
        for name in self.tensors:
            if name in names or name.startswith(ignored) or name.endswith("rotary_emb.inv_freq"):
                continue
            if name == layout.head and tied:
                self._check_tied(name, layout)
                continue
            raise CheckpointError(f"{self.path} holds {name}, which has no place in the model that "
                                  "config.json describes")  # fmt: skip

    def _check_tied(self, head: str, layout: Layout) -> None:
        """A head that is written although it is the embedding must be the embedding."""
        embedding = f"{layout.llm}embed_tokens.weight"
        one, other = self.tensors[head], self.tensors[embedding]
        size = one.num_bytes // one.item_bytes
        pairs = zip(self.chunks(head, 0, size), self.chunks(embedding, 0, size), strict=False)
        if one != other or any(bytes(a) != bytes(b) for a, b in pairs):
            raise CheckpointError(
                f"{self.path}: {head} differs from {embedding}, but tie_word_embeddings is true. "
                "Set it to false in config.json."
            )
