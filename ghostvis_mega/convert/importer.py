"""Hugging Face directories become a checkpoint of ours that any layout can start from."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from ghostvis_mega.checkpoint.manifest import write_manifest
from ghostvis_mega.config.rules_model import choices
from ghostvis_mega.config.schema import VisionConfig
from ghostvis_mega.convert.block_reader import Piece
from ghostvis_mega.convert.gguf_file import SUFFIX, GGUFFile
from ghostvis_mega.convert.hf_config import model_of_parts, parts_from_config
from ghostvis_mega.convert.hf_folder import HFFolder
from ghostvis_mega.convert.mapping import Entry, Parts
from ghostvis_mega.convert.native import layout_of_parts
from ghostvis_mega.convert.output import Shard, new_directory, write_parallel
from ghostvis_mega.convert.quantize import check_plain
from ghostvis_mega.convert.source import Source
from ghostvis_mega.convert.table import VERSION
from ghostvis_mega.convert.tensor_file import (
    CHUNK_BYTES,
    CODES,
    DTYPES,
    TensorInfo,
    as_bytes,
    cast,
    joined,
    shards_of,
)
from ghostvis_mega.model.shards import VOCABULARIES, partition_dim
from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.errors import CheckpointError

log = logging.getLogger(__name__)

DTYPE_NAMES = {"fp32": "F32", "bf16": "BF16"}
"""What `--dtype` may ask for."""
NATIVE_SHARD_BYTES = 1_000_000_000
"""Smaller than exported files: SHA-256 is what takes longest, and each file has its own."""
_POSITIONS = "tower.embeddings.position_embedding.weight"


@dataclass(frozen=True)
class ImportOptions:
    """How weights are taken over.

    Args:
        dtype: `auto` keeps each tensor's type; `fp32` and `bf16` round.
        image_size: Resize the tower's position table for pictures of this size.
        feature_layer: Which layer of a bare tower feeds the connector.
        post_norm: Whether a bare tower's last norm is applied.
        vocab_multiple: Pad embedding and head with zero rows to a multiple of this.
        new_tokens: Rows behind the vocabulary for tokens that it lacks; each is the mean of the
            others, so that the scores of new tokens are as those of any.
        shard_bytes: Largest file.
        force: Replace an existing directory.
    """

    dtype: str = "auto"
    image_size: int | None = None
    feature_layer: int | None = None
    post_norm: bool | None = None
    vocab_multiple: int = 1
    new_tokens: int = 0
    shard_bytes: int = NATIVE_SHARD_BYTES
    force: bool = False


@dataclass(frozen=True)
class _Tensor:
    """One parameter of ours on its way in."""

    entry: Entry
    source: Source
    info: TensorInfo
    """Of the parameter here."""
    dtype: str
    """Type of its tensors there."""
    resized: VisionConfig | None = None
    """For a position table that changes its size: the tower that it is made for."""
    new_rows: int = 0
    """Behind the source's; zeros follow up to the whole shape."""

    def pieces(self) -> Iterator[Piece]:
        if self.resized is not None:
            table = self.source.tensor(self.entry.hf[0].name)
            yield as_bytes(resize_positions(table, self.resized).to(DTYPES[self.info.dtype]))
            return
        for run in self.entry.runs:
            found = self.source.pieces(self.entry.hf[run.tensor].name, run.start, run.length)
            yield from cast(found, source=self.dtype, target=self.info.dtype)
        if self.new_rows:
            yield as_bytes(self._mean_row().repeat(self.new_rows).to(DTYPES[self.info.dtype]))
        new = self.new_rows * self.info.shape[-1]
        padding = prod(self.info.shape) - sum(run.length for run in self.entry.runs) - new
        if padding:
            yield bytes(padding * self.info.item_bytes)

    def _mean_row(self) -> torch.Tensor:
        """fp64 [H], over the source's rows."""
        (tensor,) = self.entry.hf
        rows, width = tensor.shape
        total = torch.zeros(width, dtype=torch.float64)
        step = max(1, CHUNK_BYTES // width)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            data = joined(self.source.pieces(tensor.name, row * width, count * width))
            values = torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(count, width)
            total += values.double().sum(0)
        return total / rows


def open_source(path: Path) -> Source:
    """A Hugging Face directory or a GGUF file.

    Raises:
        CheckpointError: It is neither, or not sound.
    """
    return GGUFFile(path) if path.suffix == SUFFIX and path.is_file() else HFFolder(path, once=True)


def tokenizer_json(paths: Sequence[Path]) -> bytes:
    """The vocabulary of the GGUF file among the sources as the content of a tokenizer.json.

    Raises:
        CheckpointError: There is none, or its vocabulary has no such form.
    """
    found = [path for path in paths if path.suffix == SUFFIX]
    if len(found) != 1:
        raise CheckpointError("--tokenizer writes what a .gguf file holds; give one as a source")
    with GGUFFile(found[0]) as file:
        return file.tokenizer_json()


def import_hf(sources: Sequence[Path], out: Path, options: ImportOptions) -> Path:
    """Write a checkpoint that `checkpoint.weights` takes.

    Args:
        sources: A LLaVA-like model, or a language model and a tower in any order, or one of them.
        out: The checkpoint's directory.
        options: How.

    Raises:
        CheckpointError: A source is no model we can hold, a tensor is missing, has another shape,
            or has no place; names it. Nothing is left at `out`.
    """
    if options.dtype != "auto" and options.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"--dtype {options.dtype} is unknown: use auto, fp32 or bf16")
    with ExitStack() as stack:
        folders = [stack.enter_context(open_source(path)) for path in sources]
        for folder in folders:
            check_plain(folder)
        given = [parts_from_config(folder.config, folder.path) for folder in folders]
        parts = _adjust(_merged(given, folders), options)
        tensors: dict[str, _Tensor] = {}
        for folder, own in zip(folders, given, strict=True):
            for tensor in _plan(folder, own, parts, options):
                tensors[tensor.entry.native] = tensor
        with new_directory(out, force=options.force, sources=sources) as temporary:
            _write(temporary, tensors, parts, folders, options)
    held = sum(prod(tensor.info.shape) for tensor in tensors.values())
    log.info("imported %d tensors, %d parameters into %s", len(tensors), held, out)
    return out


def _merged(given: Sequence[Parts], folders: Sequence[Source]) -> Parts:
    merged, owners = Parts(), {}
    for parts, folder in zip(given, folders, strict=True):
        for name in ("llm", "vision", "connector"):
            if (section := getattr(parts, name)) is None:
                continue
            if name in owners:
                raise CheckpointError(f"{owners[name]} and {folder.path} both hold model.{name}")
            owners[name] = folder.path
            merged = replace(merged, **{name: section})
    return merged


def _adjust(parts: Parts, options: ImportOptions) -> Parts:
    """The settings that the weights are to have here."""
    llm, vision = parts.llm, parts.vision
    if llm is not None:
        tokens = llm.vocab_size + options.new_tokens
        rows = -(-tokens // options.vocab_multiple) * options.vocab_multiple
        llm = llm.model_copy(update={"vocab_size": rows, "vocab_padding": rows - tokens})
    elif options.new_tokens:
        raise CheckpointError("--new-tokens: no source holds a language model")
    changes = {
        "image_size": options.image_size,
        "feature_layer": options.feature_layer,
        "post_norm": options.post_norm,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if vision is None:
        if changes:
            raise CheckpointError(f"{', '.join(changes)}: no source holds a vision tower")
    else:
        if parts.connector is not None and changes.keys() - {"image_size"}:
            raise CheckpointError(
                "feature_layer and post_norm belong to the model that was trained with them; they "
                "can be chosen for a bare tower alone"
            )
        vision = _changed(vision, changes)
    parts = replace(parts, llm=llm, vision=vision)
    model_of_parts(parts)
    return parts


def _changed(vision: VisionConfig, changes: dict[str, Any]) -> VisionConfig:
    """The tower with what the options ask for."""
    try:
        changed = VisionConfig.model_validate(vision.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise CheckpointError(f"--{option} {first['input']} cannot be: {first['msg']}") from error
    own, size, patch = vision.image_size, changed.image_size, changed.patch_size
    # A published tower may have a remainder; nobody wants one in a table that is made anew.
    if size != own and size % patch:
        near = choices([n for n in (size // patch * patch, (size // patch + 1) * patch) if n])
        raise CheckpointError(
            f"--image-size {size} is no multiple of the tower's patch size {patch}: use {near}, or "
            f"leave it out for the tower's own {own}"
        )
    return changed


def _plan(folder: Source, own: Parts, parts: Parts, options: ImportOptions) -> Iterator[_Tensor]:
    """What a source gives; every name and shape is checked before a byte is written."""
    _, found = folder.find_layout(own)
    for entry in found:
        infos = [folder.tensors[tensor.name] for tensor in entry.hf]
        for tensor, info in zip(entry.hf, infos, strict=True):
            if info.shape != tensor.shape:
                raise CheckpointError(
                    f"{folder.path}: {tensor.name} has shape {list(info.shape)}, "
                    f"{folder.settings_file} asks for {list(tensor.shape)}"
                )
            if info.dtype not in ("F32", "BF16", "F16"):
                raise CheckpointError(
                    f"{folder.path}: {tensor.name} is {info.dtype}; quantised weights cannot be "
                    "trained on. Take the model that they were made of"
                )
        if len({info.dtype for info in infos}) > 1:
            raise CheckpointError(f"{folder.path}: {', '.join(t.name for t in entry.hf)} are of "
                                  "different types, but become one matrix")  # fmt: skip
        dtype = infos[0].dtype if options.dtype == "auto" else DTYPE_NAMES[options.dtype]
        shape, resized = entry.shape, None
        new_rows = 0
        if entry.native in VOCABULARIES and parts.llm is not None:
            shape, new_rows = (parts.llm.vocab_size, *shape[1:]), options.new_tokens
        if entry.native == _POSITIONS and parts.vision != own.vision:
            assert parts.vision is not None
            count = parts.vision.num_patches + (parts.vision.kind == "clip")
            if (count, shape[1]) != shape:
                resized, shape = parts.vision, (count, shape[1])
        info = TensorInfo(dtype, shape)
        yield _Tensor(entry, folder, info, infos[0].dtype, resized, new_rows)


def resize_positions(table_PC: torch.Tensor, vision: VisionConfig) -> torch.Tensor:
    """A tower's position table for another picture size, bicubic, as transformers interpolates.

    Args:
        table_PC: Of a square grid; CLIP's class token comes first and stays.
        vision: The tower that the result is for.
    """
    first = 1 if vision.kind == "clip" else 0
    grid_PC = table_PC[first:].float()
    side = isqrt(len(grid_PC))
    grid = grid_PC.view(1, side, side, -1).permute(0, 3, 1, 2)
    size = (vision.grid, vision.grid)
    resized = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    rows_PC = resized.permute(0, 2, 3, 1).flatten(0, 2).to(table_PC.dtype)
    return torch.cat([table_PC[:first], rows_PC])


def _write(
    folder: Path,
    tensors: dict[str, _Tensor],
    parts: Parts,
    folders: Sequence[Source],
    options: ImportOptions,
) -> None:
    shards: list[Shard] = []
    for stem, modules in (("llm", ("llm",)), ("vision", ("vision", "resampler", "projector"))):
        infos = {n: t.info for n, t in tensors.items() if t.entry.module in modules}
        for number, shard in enumerate(shards_of(infos, largest=options.shard_bytes)):
            shards.append((f"{stem}-{number:05d}.safetensors", shard))
    written = write_parallel(folder, shards, lambda: lambda name: tensors[name].pieces(), crc=True)
    files: dict[str, Any] = {}
    for file, shard in shards:
        files[file] = {
            **written[file],
            "kind": "weights",
            "rank": int(file.split("-")[1][:5]),
            "tensor_rank": 0,
            "slices": {name: [0, prod(info.shape)] for name, info in shard},
        }
    extra: dict[str, Any] = {
        "imported": {
            "from": [folder.path.name for folder in folders],
            "mapping": VERSION,
            "dtype": options.dtype,
        }
    }
    write_manifest(
        folder,
        {
            "serial": 1,
            "step": 0,
            "sequences": 0,
            "layout": layout_of_parts(parts),
            "optimizer_steps": {},
            "parameters": {name: _described(t, parts) for name, t in tensors.items()},
            "files": files,
            "extra": extra,
            "versions": package_versions(),
        },
    )


def _described(tensor: _Tensor, parts: Parts) -> dict[str, Any]:
    """The manifest's entry of a parameter, as a run of one process would write it."""
    entry = tensor.entry
    in_llm = entry.module == "llm"
    gated = in_llm and parts.llm is not None and parts.llm.activation == "swiglu"
    names = {code: str(dtype).removeprefix("torch.") for dtype, code in CODES.items()}
    return {
        "shape": list(tensor.info.shape),
        "dtype": names[tensor.info.dtype],
        "module": entry.module,
        "partition_dim": partition_dim(entry.native) if in_llm else None,
        "partition_parts": 2 if gated and entry.native.endswith("linear_fc1.weight") else 1,
    }
