"""The manifest of a checkpoint (`step-00001234/manifest.json`): read, write, find what is wrong.

It is written last: a directory without one is not a checkpoint. It holds size, SHA-256 and content
of every other file and a digest of itself, so that a reader knows where each element of each
parameter lies without opening a tensor file, whatever layout wrote it. Imports no torch.

A *slice* is a run of elements of one parameter, counted in row-major order within the part of the
parameter that one tensor-parallel rank holds (the whole parameter where it is not cut).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import (
    atomic_write,
    canonical_json,
    document_digest,
    read_small,
    sha256_file,
    unnoticed,
)

MANIFEST_FILE = "manifest.json"
SCHEMA = "gvc/1"
LARGEST_MANIFEST = 256 << 20
"""Bytes; it grows with parameters times ranks."""
_FILE_NAME = re.compile(r"(llm|vision|optimizer|random)-[0-9]{5,}\.safetensors")

Kind = Literal["weights", "optimizer", "random"]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, for each element."""


class _Part(BaseModel):
    """Unknown keys are ignored: a later minor schema may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class ParameterInfo(_Part):
    """One parameter of the whole model."""

    shape: list[int]
    """Of the whole parameter."""
    dtype: str
    module: str
    """llm, vision, resampler or projector."""
    partition_dim: int | None
    """Dimension that tensor-parallel ranks share out; None where each holds all of it."""
    partition_parts: int = Field(ge=1)
    """Equal parts stacked along that dimension, each shared out by itself (gate and up: 2)."""


class FileInfo(_Part):
    """One tensor file."""

    bytes: int = Field(ge=0)
    sha256: str
    crc32: int | None = None
    """Of the content, where its writer has it: shows damage several times as fast as SHA-256."""
    kind: Kind
    """weights: tensors `NAME`; optimizer: `exp_avg/NAME`, `exp_avg_sq/NAME` and, where the weights
    are not fp32 themselves, `master/NAME`; random: states of the random generators
    (not of a checkpoint that was cut anew) and, with delayed FP8 scaling, its scales and
    histories."""
    rank: int = Field(ge=0)
    tensor_rank: int = Field(ge=0)
    """Which tensor-parallel part of cut parameters the slices count in."""
    slices: dict[str, list[int]]
    """(first element, number of elements) of each parameter that the file holds."""


class Manifest(_Part):
    """Everything about a checkpoint but its tensors."""

    schema_: str = Field(alias="schema")
    serial: int = Field(ge=0)
    """Counts the saves into one folder; the highest is the newest, also after a step back."""
    step: int = Field(ge=0)
    """Optimizer steps done."""
    sequences: int = Field(ge=0)
    """Sequences consumed by them."""
    layout: dict[str, JsonValue]
    """Settings that the tensors and the data stream depend on, by field name."""
    optimizer_steps: dict[str, int]
    """Updates of each engine (llm, vision); fewer than `step` where steps were skipped."""
    parameters: dict[str, ParameterInfo]
    files: dict[str, FileInfo]
    extra: dict[str, JsonValue]
    versions: dict[str, str] = {}
    digest: str = ""
    """SHA-256 of the rest of the manifest."""


def _schema_problem(document: Any, file: Path) -> str | None:
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, str) or not schema.startswith("gvc/"):
        return f"{file} is no manifest of a checkpoint: its `schema` is {schema!r}, not {SCHEMA!r}"
    if schema.removeprefix("gvc/").split(".")[0] != SCHEMA.removeprefix("gvc/"):
        return f"{file} has schema {schema!r}, this version reads {SCHEMA!r}"
    return None


def _content_problem(manifest: Manifest, file: Path) -> str | None:
    """A manifest may come from anywhere; it must not send us outside its directory."""
    for name, info in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            return f"{file} lists the file {name!r}, which is no name of a checkpoint's file"
        for parameter, span in info.slices.items():
            if parameter not in manifest.parameters:
                return f"{file}: {name} holds {parameter!r}, which is not among the parameters"
            if len(span) != 2 or span[0] < 0 or span[1] < 1:
                return f"{file}: {name} holds {parameter!r} as {span}, which is no slice"
    return None


def read_manifest(directory: Path) -> Manifest:
    """Read and check `directory/manifest.json`.

    Raises:
        CheckpointError: The manifest is missing, damaged, or of another major schema.
    """
    file = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory, so it is not a checkpoint")
    if not file.is_file():
        inside = sorted(path.name for path in directory.glob("step-*") if path.is_dir())
        hint = f"; it holds some, name one: {directory / inside[-1]}" if inside else ""
        raise CheckpointError(
            f"{directory} holds no {MANIFEST_FILE}, so it is not a complete checkpoint{hint}"
        )
    try:
        raw = read_small(file, limit=LARGEST_MANIFEST)
        document = json.loads(raw)
        # Fails on NaN and half a surrogate pair, which are read and can never have been written.
        canonical = canonical_json(document)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also UnicodeDecodeError
        raise CheckpointError(f"{file} is damaged: it is not valid JSON ({error})") from error
    if problem := _schema_problem(document, file):
        raise CheckpointError(problem)
    if document.get("digest") != document_digest(document) or raw != canonical:
        raise CheckpointError(f"{file} is damaged: it does not match its own digest")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{file}: field `{where}`: {first['msg']}") from error
    if problem := _content_problem(manifest, file):
        raise CheckpointError(problem)
    return manifest


def write_manifest(directory: Path, document: dict[str, Any]) -> Manifest:
    """Add schema and digest to `document`, check it and write it; returns what readers will see."""
    document = {**document, "schema": SCHEMA}
    document["digest"] = document_digest(document)
    manifest = Manifest.model_validate(document)
    atomic_write(directory / MANIFEST_FILE, canonical_json(document))
    return manifest


def size_problem(directory: Path, name: str, info: FileInfo) -> str | None:
    """A sentence if a file is missing or has another size than the manifest says."""
    path = directory / name
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != info.bytes:
        return f"{path} is damaged: it has {size} bytes, the manifest says {info.bytes}"
    return None


def digest_problem(
    directory: Path, name: str, info: FileInfo, *, moved: Callable[[int], None] = unnoticed
) -> str | None:
    """As `size_problem`, and the content is compared with its SHA-256; `moved` is told of bytes
    that were read."""
    if problem := size_problem(directory, name, info):
        return problem
    try:
        found = sha256_file(directory / name, moved=moved)
    except OSError as error:
        return f"{directory / name} cannot be read: {error.strerror}"
    if found != info.sha256:
        return (
            f"{directory / name} is damaged: its sha256 is {found[:12]}..., "
            f"the manifest says {info.sha256[:12]}..."
        )
    return None
