"""Checkpoints of ours become directories that stock programs load."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ghostvis_mega.checkpoint.manifest import Manifest
from ghostvis_mega.config.schema import LLMConfig
from ghostvis_mega.convert.assets import Assets, Found, check_chat, find_assets, write_assets
from ghostvis_mega.convert.block_reader import Piece
from ghostvis_mega.convert.card import card
from ghostvis_mega.convert.hf_config import Format, choose_format, config_of_parts
from ghostvis_mega.convert.hf_folder import CONFIG
from ghostvis_mega.convert.importer import DTYPE_NAMES
from ghostvis_mega.convert.mapping import Entry, Parts, entries
from ghostvis_mega.convert.native import NativeWeights
from ghostvis_mega.convert.output import (
    SHARD_BYTES,
    WRITERS,
    Shard,
    hf_shards,
    new_directory,
    write_export_file,
    write_index,
    write_parallel,
)
from ghostvis_mega.convert.remote import code_files
from ghostvis_mega.convert.table import LAYOUTS, VERSION
from ghostvis_mega.convert.tensor_file import DTYPES, TensorInfo, cast
from ghostvis_mega.utils.errors import CheckpointError

log = logging.getLogger(__name__)

_MODULES = {
    "llava": {"llm", "vision", "resampler", "projector"},
    "ghostvis": {"llm", "vision", "resampler", "projector"},
    "text": {"llm"},
    "tower": {"vision"},
}


@dataclass(frozen=True)
class ExportOptions:
    """What an export is to be.

    Args:
        format: `auto`, or one of `hf_config.FORMATS`.
        dtype: `auto` keeps each tensor's type; `fp32` and `bf16` round to the nearest.
        assets: Tokenizer and template.
        vocab_size: Rows of the vocabulary to write; None: all but padding.
        shard_bytes: Largest file.
        force: Replace an existing directory.
        check: Compare the checkpoint's files with their digests meanwhile.
    """

    format: str = "auto"
    dtype: str = "auto"
    assets: Assets = field(default_factory=Assets)
    vocab_size: int | None = None
    shard_bytes: int = SHARD_BYTES
    force: bool = False
    check: bool = True


@dataclass(frozen=True)
class ExportPlan:
    """All that is decided before a weight is read; the same for any source of the weights."""

    parts: Parts
    form: Format
    entries: tuple[Entry, ...]
    infos: dict[str, TensorInfo]
    """Tensors that are written, in order."""
    native: dict[str, TensorInfo]
    """Type and shape of our parameters."""
    found: Found
    vocab: int

    @property
    def dtype(self) -> str:
        """The type that most elements are written in, as transformers names it."""
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        return str(DTYPES[max(sizes, key=sizes.__getitem__)]).removeprefix("torch.")

    def names_of(self, native: str) -> list[str]:
        """The tensors that a parameter of ours is cut into; none where the format lacks it."""
        return self._names.get(native, [])

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return {entry.native: [tensor.name for tensor in entry.hf] for entry in self.entries}

    def shards(self, largest: int) -> list[Shard]:
        """Files and their tensors."""
        return hf_shards(self.infos, largest=largest)


def plan_export(
    parts: Parts,
    native: dict[str, TensorInfo],
    options: ExportOptions,
) -> ExportPlan:
    """Decide what is written.

    Args:
        parts: The model.
        native: Type and shape of our parameters by name.
        options: Asked for.

    Raises:
        CheckpointError: The format cannot hold the model, or something it needs is not given.
    """
    if options.dtype != "auto" and options.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"--dtype {options.dtype} is unknown: use auto, fp32 or bf16")
    form = choose_format(parts, options.format)
    found = check_chat(find_assets(options.assets), form)
    vocab = 0
    if parts.llm is not None:
        vocab = _rows(parts.llm, found, options.vocab_size)
    if form in ("llava", "ghostvis"):
        image = found.tokens.get("image")
        if image is None:
            raise CheckpointError(
                "which token stands for an image? Name the data (--data), a Hugging Face directory "
                "(--assets) or the id (--image-token)"
            )
        if image >= vocab:
            raise CheckpointError(f"the image token {image} is not among the {vocab} rows")
    mapped = entries(parts, LAYOUTS[form], hf_vocab=vocab or None)
    infos = {}
    for entry in mapped:
        if entry.native not in native:
            raise CheckpointError(f"the weights lack {entry.native}, which the model has")
        dtype = native[entry.native].dtype
        if options.dtype != "auto":
            dtype = DTYPE_NAMES[options.dtype]
        infos |= {tensor.name: TensorInfo(dtype, tensor.shape) for tensor in entry.hf}
    return ExportPlan(
        parts=parts,
        form=form,
        entries=tuple(mapped),
        infos=infos,
        native=native,
        found=found,
        vocab=vocab,
    )


def _rows(llm: LLMConfig, found: Found, asked: int | None) -> int:
    """How many rows of the vocabulary are written."""
    ids, whole, used = found.vocab_size, llm.vocab_size, llm.vocab_tokens
    name = "the tokenizer" if found.tokenizer is None else f"tokenizer {found.tokenizer.path}"
    if ids > whole:
        raise CheckpointError(
            f"{name} has {ids} ids, the model only {whole}: it is another model's"
        )
    if not asked and ids > used:
        raise CheckpointError(
            f"{name} has {ids} ids, the model {used} and {whole - used} rows of padding: it is "
            f"another model's, or give `convert export --vocab-size {ids}`"
        )
    rows = asked or used
    if not ids <= rows <= whole:
        raise CheckpointError(
            f"--vocab-size {rows} is not between the tokenizer's {ids} ids and the model's {whole} "
            "rows"
        )
    return rows


def export_hf(checkpoint: Path, out: Path, options: ExportOptions) -> Path:
    """Write a Hugging Face directory from a checkpoint of any layout.

    Raises:
        CheckpointError: The checkpoint is damaged, holds a parameter that has no place, or cannot
            be written in this format. Nothing is left at `out`.
    """
    assets = options.assets
    given = (checkpoint, assets.data, assets.tokenizer, assets.folder)
    sources = [path for path in given if path is not None]
    with ExitStack() as stack:
        weights = stack.enter_context(NativeWeights(checkpoint, once=True))
        plan = plan_export(weights.parts, weights.tensors, options)
        # Against the whole vocabulary: rows of padding are not written, but are there.
        whole = entries(weights.parts, LAYOUTS[plan.form])
        weights.check(whole, modules=_MODULES[plan.form])
        # A SHA-256 is taken while files are read for the export, by half of the cores: it is a
        # chain, and so is that of the new file. A CRC-32 is of the very bytes that are exported.
        cores = len(os.sched_getaffinity(0))
        pool = stack.enter_context(ThreadPoolExecutor(min(WRITERS, max(1, cores // 2))))
        files = weights.reader.files("weights") if options.check else []
        beside = [pool.submit(weights.damage, file) for file in files if not weights.has_crc(file)]
        with new_directory(out, force=options.force, sources=sources) as folder:
            shards = plan.shards(options.shard_bytes)
            pieces = tensor_pieces(plan, weights.pieces)
            written = write_parallel(folder, shards, lambda: pieces)
            told = [future.result() for future in beside]
            told += [weights.damage(file) for file in files if weights.has_crc(file)]
            if found := [sentence for sentence in told if sentence]:
                raise CheckpointError("; ".join(found))
            finish_export(folder, plan, shards, written, _about(weights.manifest))
    log.info("exported %d tensors as %s into %s", len(plan.infos), plan.form, out)
    return out


def _about(manifest: Manifest) -> dict[str, Any]:
    return about_training(
        manifest.layout,
        step=manifest.step,
        sequences=manifest.sequences,
        imported=manifest.extra.get("imported"),
    )


def tensor_pieces(
    plan: ExportPlan, native_pieces: Callable[[str, int, int], Iterator[Piece]]
) -> Callable[[str], Iterator[Piece]]:
    """Bytes of each tensor of the plan, cut out of our parameters.

    Args:
        plan: The export.
        native_pieces: (name, first element, number of elements) of a parameter to its bytes.
    """
    places = {t.name: (e, i) for e in plan.entries for i, t in enumerate(e.hf)}

    def pieces(name: str) -> Iterator[Piece]:
        entry, index = places[name]
        source = plan.native[entry.native].dtype
        for start, length in entry.native_runs(index):
            yield from cast(
                native_pieces(entry.native, start, length),
                source=source,
                target=plan.infos[name].dtype,
            )

    return pieces


def about_training(
    layout: Mapping[str, JsonValue], *, step: int, sequences: int, imported: JsonValue
) -> dict[str, Any]:
    """What an export says about the weights that it is of.

    Args:
        layout: Settings by field name, as a checkpoint's manifest has them.
        step: Optimizer steps done.
        sequences: Sequences consumed by them.
        imported: What the checkpoint says about an import, if it is one.
    """
    names = (
        "train.seed",
        "train.precision",
        "train.freeze",
        "batch.global_size",
        "data.seq_length",
        "data.packing",
    )
    return {
        "step": step,
        "sequences": sequences,
        "training": {n: layout[n] for n in names if n in layout},
        "imported": imported,
    }


def write_settings(folder: Path, plan: ExportPlan) -> None:
    """What an export says of model and tokenizer; needs no weight.

    Raises:
        CheckpointError: The tokenizer has no equal form that is read for such a model.
    """
    config = config_of_parts(
        plan.parts, plan.form, dtype=plan.dtype, vocab=plan.vocab, tokens=plan.found.tokens
    )
    (folder / CONFIG).write_bytes(ordered_json(config))
    llm = plan.parts.llm
    write_assets(
        folder, plan.found, plan.parts, plan.form, max_positions=llm.max_positions if llm else None
    )


def finish_export(
    folder: Path,
    plan: ExportPlan,
    shards: list[Shard],
    written: dict[str, Any],
    about: dict[str, Any],
) -> None:
    """All files beside the weights; the manifest of the export comes last.

    Args:
        folder: Holds the weights.
        plan: The export.
        shards: Its files.
        written: Their sizes and digests.
        about: From `about_training`.
    """
    write_index(folder, shards)
    write_settings(folder, plan)
    if plan.form == "ghostvis":
        for name, text in code_files().items():
            (folder / name).write_text(text, encoding="utf-8")
    text = card(plan.parts, plan.form, about, dtype=plan.dtype)
    (folder / "README.md").write_text(text, encoding="utf-8")
    write_export_file(
        folder, written, {"format": plan.form, "mapping": VERSION, "checkpoint": about}
    )


def ordered_json(value: Any) -> bytes:
    """JSON in the order of its keys: `auto_map` is read in order."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
