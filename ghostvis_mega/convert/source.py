"""Weights under Hugging Face's names, whatever kind of file they lie in."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from ghostvis_mega.convert.block_reader import Buffer, Piece, loaded
from ghostvis_mega.convert.mapping import Entry, Parts, entries
from ghostvis_mega.convert.table import IGNORED, LAYOUTS, Layout
from ghostvis_mega.convert.tensor_file import CHUNK_BYTES, DTYPES, TensorInfo, joined
from ghostvis_mega.utils.closing import Closing
from ghostvis_mega.utils.errors import CheckpointError


class Source(Closing, ABC):
    """An open set of weights; use it in a `with` statement."""

    path: Path
    tensors: dict[str, TensorInfo]
    others: set[str]
    """Tensors of types that no weight has, such as buffers of integers."""

    @property
    @abstractmethod
    def settings_file(self) -> str:
        """Name of the file that says what the model is."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The model's settings, as config.json has them."""

    @abstractmethod
    def pieces(self, name: str, start: int, length: int) -> Iterator[Piece]:
        """Elements of a tensor, row-major."""

    def chunks(self, name: str, start: int, length: int) -> Iterator[Buffer]:
        """The same as bytes, each valid until the next."""
        return loaded(self.pieces(name, start, length), size=CHUNK_BYTES)

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of one tensor; for small ones."""
        info = self.tensors[name]
        data = joined(self.pieces(name, 0, prod(info.shape)))
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)

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
                if name in self.others:
                    hint = " as a floating-point tensor"
                raise CheckpointError(
                    f"{self.path} lacks {name}, which {self.settings_file} asks for{hint}"
                )
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
                                  f"{self.settings_file} describes")  # fmt: skip

    def _check_tied(self, head: str, layout: Layout) -> None:
        """A head that is written although it is the embedding must be the embedding."""
        embedding = f"{layout.llm}embed_tokens.weight"
        one, other = self.tensors[head], self.tensors[embedding]
        size = one.num_bytes // one.item_bytes
        pairs = zip(self.chunks(head, 0, size), self.chunks(embedding, 0, size), strict=False)
        if one != other or any(bytes(a) != bytes(b) for a, b in pairs):
            raise CheckpointError(
                f"{self.path}: {head} differs from {embedding}, but tie_word_embeddings is true. "
                f"Set it to false in {self.settings_file}."
            )
