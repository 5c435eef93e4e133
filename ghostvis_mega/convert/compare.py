"""Tensor by tensor: what differs between two sets of weights, of ours or of Hugging Face."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import torch

from ghostvis_mega.checkpoint.manifest import MANIFEST_FILE
from ghostvis_mega.convert.block_reader import Buffer
from ghostvis_mega.convert.hf_config import parts_from_config
from ghostvis_mega.convert.hf_folder import HFFolder
from ghostvis_mega.convert.mapping import entries
from ghostvis_mega.convert.native import NativeWeights
from ghostvis_mega.convert.output import EXPORT_FILE, export_damage
from ghostvis_mega.convert.table import LAYOUTS
from ghostvis_mega.convert.tensor_file import DTYPES, TensorInfo
from ghostvis_mega.utils.errors import CheckpointError

_CANONICAL = LAYOUTS["llava"]


@dataclass(frozen=True)
class Named:
    """Weights under the names of the hub's LLaVA, wherever they are from."""

    path: Path
    tensors: dict[str, TensorInfo]
    chunks: Callable[[str], Iterator[Buffer]]


def open_weights(path: Path, stack: ExitStack) -> Named:
    """A checkpoint of ours or a Hugging Face directory.

    Raises:
        CheckpointError: It is neither, or not sound.
    """
    if (path / MANIFEST_FILE).is_file():
        return _native(stack.enter_context(NativeWeights(path)))
    return _hugging_face(stack.enter_context(HFFolder(path)))


def _native(weights: NativeWeights) -> Named:
    mapped = entries(weights.parts, _CANONICAL, hf_vocab=weights.hf_vocab)
    weights.check(
        entries(weights.parts, _CANONICAL),
        modules={info.module for info in weights.manifest.parameters.values()},
    )
    places = {t.name: (e, i) for e in mapped for i, t in enumerate(e.hf)}
    infos = {
        t.name: TensorInfo(weights.tensors[e.native].dtype, t.shape) for e in mapped for t in e.hf
    }

    def chunks(name: str) -> Iterator[Buffer]:
        entry, index = places[name]
        for start, length in entry.native_runs(index):
            yield from weights.chunks(entry.native, start, length)

    return Named(weights.path, infos, chunks)


def _hugging_face(folder: HFFolder) -> Named:
    parts = parts_from_config(folder.config, folder.path)
    _, there = folder.find_layout(parts)
    names = {
        common.name: own.name
        for mine, theirs in zip(there, entries(parts, _CANONICAL), strict=True)
        for own, common in zip(mine.hf, theirs.hf, strict=True)
    }
    infos = {common: folder.tensors[own] for common, own in names.items()}
    return Named(
        folder.path,
        infos,
        lambda name: folder.chunks(names[name], 0, prod(infos[name].shape)),
    )


@dataclass(frozen=True)
class Difference:
    """What is different about one tensor."""

    name: str
    what: str
    """A sentence's part: `only in A`, `shape [2] and [3]`, `values`."""
    elements: int = 0
    """Elements with other bits."""
    largest: float = 0.0
    """Greatest absolute difference."""
    relative: float = 0.0
    """Norm of the difference over the norm of the first."""


@dataclass(frozen=True)
class Comparison:
    """The result for two sets of weights."""

    tensors: int
    """Tensors that both have."""
    num_bytes: int
    """Of them, in the first."""
    differences: tuple[Difference, ...]


def compare(one: Path, other: Path, *, parts: tuple[str, ...] = ()) -> Comparison:
    """Compare all tensors.

    Args:
        one: A checkpoint or a Hugging Face directory.
        other: Another.
        parts: `llm`, `vision`, `connector`: only these; empty: all that are there.

    Raises:
        CheckpointError: One of them is not sound.
    """
    prefixes = {
        "llm": ("language_model.",),
        "vision": ("vision_tower.",),
        "connector": ("multi_modal_projector.",),
    }
    if unknown := [part for part in parts if part not in prefixes]:
        raise CheckpointError(f"--part {unknown[0]} is unknown: use llm, vision or connector")
    wanted = tuple(prefix for part in parts or prefixes for prefix in prefixes[part])
    with ExitStack() as stack:
        a, b = open_weights(one, stack), open_weights(other, stack)
        mine = {n: i for n, i in a.tensors.items() if n.startswith(wanted)}
        theirs = {n: i for n, i in b.tensors.items() if n.startswith(wanted)}
        found = [Difference(n, f"only in {one}") for n in mine if n not in theirs]
        found += [Difference(n, f"only in {other}") for n in theirs if n not in mine]
        both = [name for name in mine if name in theirs]
        for name in both:
            if (difference := _compare(name, a, b)) is not None:
                found.append(difference)
    if not both:
        raise CheckpointError(f"{one} and {other} have no tensor in common")
    return Comparison(len(both), sum(mine[n].num_bytes for n in both), tuple(found))


def _compare(name: str, a: Named, b: Named) -> Difference | None:
    mine, theirs = a.tensors[name], b.tensors[name]
    if mine.shape != theirs.shape:
        return Difference(name, f"shape {list(mine.shape)} and {list(theirs.shape)}")
    elements, largest, square, norm = 0, 0.0, 0.0, 0.0
    same = mine.dtype == theirs.dtype
    for x, y in _pairs(a.chunks(name), b.chunks(name), mine, theirs):
        if same and x == y:
            continue
        one, other = _numbers(x, mine), _numbers(y, theirs)
        delta = one.double() - other.double()
        # Not `delta`: -0.0 and 0.0, or two kinds of NaN, are other bytes.
        elements += int((one.view(_BITS[one.dtype]) != other.view(_BITS[other.dtype])).sum() if same
                        else (delta != 0).sum())  # fmt: skip
        largest = max(largest, float(delta.abs().max()))
        square += float(delta.square().sum())
        norm += float(one.double().square().sum())
    if same and elements == 0:
        return None
    what = "values" if same else f"type {mine.dtype} and {theirs.dtype}"
    return Difference(name, what, elements, largest, sqrt(square / norm) if norm else 0.0)


_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.int8: torch.int8,
    torch.float8_e4m3fn: torch.int8,
}


def _numbers(data: bytes, info: TensorInfo) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype])


_STEP = 1 << 22


def _pairs(
    a: Iterator[Buffer], b: Iterator[Buffer], mine: TensorInfo, theirs: TensorInfo
) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of two tensors with the same elements, however their streams are cut."""
    x, y = bytearray(), bytearray()
    left = prod(mine.shape)
    while left:
        count = min(_STEP, left)
        for buffer, stream, size in ((x, a, mine.item_bytes), (y, b, theirs.item_bytes)):
            while len(buffer) < count * size:
                buffer += next(stream)
        yield bytes(x[: count * mine.item_bytes]), bytes(y[: count * theirs.item_bytes])
        del x[: count * mine.item_bytes], y[: count * theirs.item_bytes]
        left -= count


def damage(path: Path) -> list[str]:
    """Sentences about files that are not what the directory's own list says; reads all of them.

    Raises:
        CheckpointError: It has no such list.
    """
    if (path / MANIFEST_FILE).is_file():
        with NativeWeights(path) as weights:
            return weights.reader.damage(weights.reader.files())
    if (path / EXPORT_FILE).is_file():
        return export_damage(path)
    raise CheckpointError(
        f"{path} holds neither {MANIFEST_FILE} nor {EXPORT_FILE}, so there is nothing to verify "
        "it against; name a second directory to compare it with"
    )
