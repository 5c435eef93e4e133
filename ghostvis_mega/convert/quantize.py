"""A Hugging Face directory with its linear layers in INT8 or FP8, some rows at a time."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Any

import torch

from ghostvis_mega.convert.block_reader import Piece
from ghostvis_mega.convert.hf_config import parts_from_config
from ghostvis_mega.convert.hf_folder import CONFIG, INDEX, HFFolder, read_json
from ghostvis_mega.convert.mapping import Parts, entries
from ghostvis_mega.convert.output import (
    EXPORT_FILE,
    SHARD_BYTES,
    hf_shards,
    new_directory,
    write_export_file,
    write_index,
    write_ordered,
)
from ghostvis_mega.convert.schemes import DEFAULT_SKIP, Scheme, find_scheme, is_skipped, patterns
from ghostvis_mega.convert.source import Source
from ghostvis_mega.convert.table import LAYOUTS, VERSION
from ghostvis_mega.convert.tensor_file import (
    CHUNK_BYTES,
    DTYPES,
    TensorInfo,
    as_bytes,
    joined,
)
from ghostvis_mega.utils.errors import CheckpointError

log = logging.getLogger(__name__)

_TABLES = ("embed_tokens.weight", "position_embedding.weight", "latents", "class_embedding")
"""Matrices that belong to no linear layer."""


@dataclass(frozen=True)
class LayerError:
    """What rounding did to one matrix."""

    name: str
    signal_to_noise_db: float
    largest: float
    """Greatest absolute error."""


@dataclass(frozen=True)
class Quantized:
    """The outcome."""

    layers: tuple[LayerError, ...]
    bytes_before: int
    bytes_after: int


def check_plain(folder: Source) -> None:
    """Raise where weights are quantised, in whatever way.

    Raises:
        CheckpointError: Says to take the model that they are made of.
    """
    config = folder.config
    # Of a model of several parts, one part may be.
    parts = {key: value for key, value in config.items() if isinstance(value, dict)}
    for where, settings in {"": config, **parts}.items():
        if settings.get("quantization_config") is not None:
            name = f"{where}.quantization_config" if where else "quantization_config"
            raise CheckpointError(
                f"{folder.path} is quantised already ({name} in its {folder.settings_file}): take "
                "the model that it is made of; vLLM and transformers serve the quantised one"
            )


def quantize_hf(
    source: Path,
    out: Path,
    *,
    scheme: str,
    skip_modules: Sequence[str] = DEFAULT_SKIP,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Quantized:
    """Write a quantised copy of a directory.

    Args:
        source: Weights in floating point.
        out: The new directory.
        scheme: `int8` or `fp8`.
        skip_modules: Names of modules that stay as they are, as in the directory or as
            transformers names them: shell patterns or `re:...`.
        shard_bytes: Largest file.
        force: Replace an existing directory.

    Raises:
        CheckpointError: The source is no model we know, or quantised already.
    """
    chosen, ignore = find_scheme(scheme), patterns(skip_modules)
    with HFFolder(source) as folder:
        config = folder.config
        check_plain(folder)
        parts = parts_from_config(config, source)
        layers = _linear_layers(folder, parts)
        _check_skips(skip_modules, layers)
        linear = {
            name
            for name, modules in layers.items()
            if not any(is_skipped(module, ignore) for module in modules)
        }
        if not linear:
            raise CheckpointError(f"{source}: --skip leaves no linear layer to quantise")
        if parts.llm is not None and parts.llm.tied_embeddings:
            # The head is the embedding, and no matrix of its own lies in the files.
            ignore = tuple(dict.fromkeys((*ignore, "re:.*lm_head")))
        infos: dict[str, TensorInfo] = {}
        for name, info in folder.tensors.items():
            infos[name] = info
            if name in linear:
                infos[name] = TensorInfo(chosen.code, info.shape)
                infos[f"{name}_scale"] = TensorInfo("F32", (info.shape[0], 1))
        errors: list[LayerError] = []
        shards = hf_shards(infos, largest=shard_bytes)
        with new_directory(out, force=force, sources=[source]) as temporary:
            stream = _stream(folder, linear, chosen, errors)
            written = write_ordered(temporary, shards, stream)
            write_index(temporary, shards)
            _copy_others(source, temporary)
            settings = config | {"quantization_config": chosen.config(ignore)}
            (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
            _note(temporary, chosen)
            about: dict[str, Any] = {"quantized": chosen.name, "skip": list(ignore)}
            if (source / EXPORT_FILE).is_file():
                about["checkpoint"] = read_json(source / EXPORT_FILE).get("checkpoint")
            write_export_file(temporary, written, {"mapping": VERSION, **about})
        before = sum(info.num_bytes for info in folder.tensors.values())
    after = sum(info.num_bytes for info in infos.values())
    log.info("quantised %d layers to %s: %.2f of the size", len(errors), scheme, after / before)
    return Quantized(tuple(errors), before, after)


def _check_skips(skip_modules: Sequence[str], layers: Mapping[str, tuple[str, str]]) -> None:
    """Raise where a pattern that someone wrote matches nothing: its layer would be rounded.

    Raises:
        CheckpointError: Names the pattern.
    """
    names = [name for modules in layers.values() for name in modules]
    for pattern in skip_modules:
        # The usual ones are for models of any kind.
        if pattern not in DEFAULT_SKIP and not any(
            is_skipped(name, patterns([pattern])) for name in names
        ):
            raise CheckpointError(
                f"--skip {pattern} matches no linear layer; there is {names[0]}, for example"
            )


def _linear_layers(folder: HFFolder, parts: Parts) -> dict[str, tuple[str, str]]:
    """Names of the matrices that can become 8 bits wide, and of their modules: in the directory and
    in transformers."""
    _, there = folder.find_layout(parts)
    found = {}
    for mine, theirs in zip(there, entries(parts, LAYOUTS["ghostvis"]), strict=True):
        for own, module in zip(mine.hf, theirs.hf, strict=True):
            if len(own.shape) != 2 or own.name.endswith(_TABLES):
                continue
            names = (own.name.removesuffix(".weight"), module.name.removesuffix(".weight"))
            found[own.name] = names
    return found


def _stream(
    folder: HFFolder, linear: set[str], scheme: Scheme, errors: list[LayerError]
) -> Iterator[tuple[str, Iterator[Piece]]]:
    for name, info in folder.tensors.items():
        if name not in linear:
            yield name, folder.pieces(name, 0, info.num_bytes // info.item_bytes)
            continue
        scales: list[torch.Tensor] = []
        yield name, _quantised(folder, name, scheme, scales, errors)
        yield f"{name}_scale", iter([as_bytes(torch.cat(scales))])


def _quantised(
    folder: HFFolder,
    name: str,
    scheme: Scheme,
    scales: list[torch.Tensor],
    errors: list[LayerError],
) -> Iterator[Piece]:
    """The rounded matrix, some rows at a time; its scales go into `scales`."""
    info = folder.tensors[name]
    rows, width = info.shape
    step = max(1, CHUNK_BYTES // (4 * width))
    signal = noise = largest = 0.0
    for row in range(0, rows, step):
        count = min(step, rows - row)
        data = joined(folder.pieces(name, row * width, count * width))
        weight_OI = torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(count, width)
        quantised, scale_O1 = scheme.weight(weight_OI)
        scales.append(scale_O1)
        error = quantised.float() * scale_O1 - weight_OI.float()
        signal += float(weight_OI.double().square().sum())
        noise += float(error.double().square().sum())
        largest = max(largest, float(error.abs().max()))
        yield as_bytes(quantised.view(torch.uint8))
    ratio = 10 * log10(signal / noise) if noise and signal else float("inf")
    errors.append(LayerError(name, ratio, largest))


def _copy_others(source: Path, folder: Path) -> None:
    """Tokenizer, template, processor, code and card; not the weights and what lists them."""
    for path in sorted(source.iterdir()):
        listed = path.suffix == ".safetensors" or path.name in (INDEX, CONFIG, EXPORT_FILE)
        if path.is_file() and not listed:
            shutil.copyfile(path, folder / path.name)


def _note(folder: Path, scheme: Scheme) -> None:
    """The model card tells that the weights are quantised."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        note = (
            f"Linear layers are {scheme.name.upper()} (weights by channel, inputs by token, "
            "compressed-tensors); head, tower and connector are as trained unless config.json's "
            "`ignore` says otherwise. transformers needs `pip install compressed-tensors`.\n\n"
        )
        card.write_text(text.replace("## Training", f"{note}## Training", 1), encoding="utf-8")
