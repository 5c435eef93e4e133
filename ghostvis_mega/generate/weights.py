"""Weights of a model for inference: a checkpoint of ours or a Hugging Face directory, parameter by
parameter through the one table of names."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ghostvis_mega.checkpoint.manifest import MANIFEST_FILE
from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.convert.block_reader import Piece
from ghostvis_mega.convert.hf_config import model_of_parts, parts_from_config
from ghostvis_mega.convert.hf_folder import CONFIG, HFFolder
from ghostvis_mega.convert.mapping import Parts
from ghostvis_mega.convert.native import NativeWeights
from ghostvis_mega.convert.output import EXPORT_FILE, export_damage
from ghostvis_mega.convert.quantize import check_plain
from ghostvis_mega.convert.tensor_file import DTYPES, TensorInfo, joined
from ghostvis_mega.utils.errors import CheckpointError

_FLOATS = ("F32", "BF16", "F16")


def is_native(path: Path) -> bool:
    """Whether a directory is a checkpoint of ours; else it should be one of Hugging Face.

    Raises:
        CheckpointError: It is neither.
    """
    if (path / MANIFEST_FILE).is_file():
        return True
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds neither {MANIFEST_FILE} nor {CONFIG}: give a checkpoint "
            "(RUN/checkpoints/step-...) or a Hugging Face directory"
        )
    return False


@dataclass(frozen=True)
class ModelSource:
    """An open model whose parameters can be read one by one under our names."""

    path: Path
    model: ModelConfig
    tensors: dict[str, TensorInfo]
    _pieces: Callable[[str], Iterator[Piece]]

    def read(self, name: str) -> torch.Tensor:
        """One parameter whole, on the CPU, as it is stored."""
        info = self.tensors[name]
        data = joined(self._pieces(name))
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)


@contextmanager
def open_model(path: Path, *, check: bool = True) -> Iterator[ModelSource]:
    """Open a model; leaving the block compares its files with their digests, where it has any.

    Args:
        path: Checkpoint or directory.
        check: Read all files once more beside the loading, for their SHA-256.

    Raises:
        CheckpointError: It is no whole model, a tensor is missing or has another shape, or a file
            is damaged; names it.
    """
    native = is_native(path)
    with ExitStack() as stack:
        if native:
            weights = stack.enter_context(NativeWeights(path))
            source = _native(weights)
        else:
            source = _hugging_face(stack.enter_context(HFFolder(path)))
        pool = stack.enter_context(ThreadPoolExecutor(4))
        damage = []
        if check and native:
            files = weights.reader.files("weights")
            damage = [pool.submit(weights.reader.damage, [file]) for file in files]
        elif check and (path / EXPORT_FILE).is_file():
            damage = [pool.submit(export_damage, path)]
        yield source
        if found := [sentence for future in damage for sentence in future.result()]:
            raise CheckpointError("; ".join(found))


def config_of(path: Path) -> ModelConfig:
    """The model's settings alone; reads no weight.

    Raises:
        CheckpointError: As `open_model`.
    """
    with open_model(path, check=False) as source:
        return source.model


def _whole(parts: Parts, path: Path) -> ModelConfig:
    model = model_of_parts(parts)
    if model is None:
        raise CheckpointError(f"{path} is only a part of a model: text comes from a language model")
    return model


def _native(weights: NativeWeights) -> ModelSource:
    model = _whole(weights.parts, weights.path)

    def pieces(name: str) -> Iterator[Piece]:
        return weights.pieces(name, 0, prod(weights.tensors[name].shape))

    return ModelSource(weights.path, model, weights.tensors, pieces)


def _hugging_face(folder: HFFolder) -> ModelSource:
    check_plain(folder)
    parts = parts_from_config(folder.config, folder.path)
    _, found = folder.find_layout(parts)
    infos = {}
    for entry in found:
        kinds = {folder.tensors[tensor.name].dtype for tensor in entry.hf}
        for tensor in entry.hf:
            shape = folder.tensors[tensor.name].shape
            if shape != tensor.shape:
                raise CheckpointError(
                    f"{folder.path}: {tensor.name} has shape {list(shape)}, config.json asks for "
                    f"{list(tensor.shape)}"
                )
        if len(kinds) > 1 or not kinds <= set(_FLOATS):
            raise CheckpointError(
                f"{folder.path}: {entry.hf[0].name} is {' and '.join(sorted(kinds))}; read are "
                f"{', '.join(_FLOATS)}. Take the model that it was quantised from, or vLLM"
            )
        infos[entry.native] = TensorInfo(kinds.pop(), entry.shape)
    places = {entry.native: entry for entry in found}

    def pieces(name: str) -> Iterator[Piece]:
        entry = places[name]
        for run in entry.runs:
            yield from folder.pieces(entry.hf[run.tensor].name, run.start, run.length)

    model = _whole(parts, folder.path)
    return ModelSource(folder.path, model, infos, pieces)
