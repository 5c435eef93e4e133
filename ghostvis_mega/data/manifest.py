"""The manifest of a prepared dataset (`NAME.gvd/manifest.json`): read, write, find what is wrong.

Imports neither torch nor numpy, so that a wrong path in a configuration is reported at once.
The manifest is written last: a directory without one is not a dataset. It holds size and SHA-256
of every other file, and a digest of itself.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import (
    atomic_write,
    canonical_json,
    document_digest,
    read_small,
    sha256_file,
)

MANIFEST_FILE = "manifest.json"
SCHEMA = "gvd/1"
PLANS_DIRECTORY = "plans"
"""Pack plans are made after the dataset and carry digests of their own; the manifest omits them."""

MEDIA_INDEX = "media/images.idx"
TOKENS = "samples/tokens.bin"
SAMPLE_INDEX = "samples/samples.idx"
IMAGE_REFS = "samples/images.ref"
SPANS = "samples/spans.bin"
KEYS = "samples/keys.bin"
ANSWERS = "samples/answers.bin"
REJECTS = "rejects.jsonl"
REQUIRED_FILES = (MEDIA_INDEX, TOKENS, SAMPLE_INDEX, IMAGE_REFS, SPANS, KEYS, ANSWERS, REJECTS)
REQUIRED_SPECIALS = ("pad", "im_start", "im_end", "image")
ALL_TURNS = "-turns"
"""Ending of the names of chat templates that train what every role says."""
RECORD_BYTES = 64
"""Size of one record of images.idx and of samples.idx."""


class _Part(BaseModel):
    """Unknown keys are ignored: a later minor schema may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Counts(_Part):
    """Totals; `tokens` counts each image as one token, as stored."""

    samples: int = Field(ge=0)
    images: int = Field(ge=0)
    tokens: int = Field(ge=0)
    trained_tokens: int = Field(ge=0)
    rejected: int = Field(ge=0)


class TokenizerInfo(_Part):
    """The tokenizer that made the tokens; `file` is relative to the dataset."""

    kind: Literal["sentencepiece", "tokenizer.json", "tiktoken"]
    file: str
    sha256: str
    vocab_size: int = Field(ge=1)
    specials: dict[str, int]


class TemplateInfo(_Part):
    """Chat template that wrapped the turns."""

    name: str

    @property
    def writes(self) -> str:
        """The template of the same text in which answers alone are trained."""
        return self.name.removesuffix(ALL_TURNS)


class SourceInfo(_Part):
    """One input; `samples.idx` refers to it by its place in the list."""

    name: str
    license: str = ""
    rows: int = Field(ge=0)
    rejected: int = Field(ge=0)


class FileInfo(_Part):
    """Size and hex SHA-256 of one file."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(_Part):
    """Everything about a dataset but its content."""

    schema_: str = Field(alias="schema")
    counts: Counts
    tokenizer: TokenizerInfo
    template: TemplateInfo
    sources: tuple[SourceInfo, ...]
    files: dict[str, FileInfo]
    tool: str = ""
    digest: str = ""
    """SHA-256 of the rest of the manifest: the identity of the dataset."""


def _schema_problem(document: Any, file: Path) -> str | None:
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, str) or not schema.startswith("gvd/"):
        return f"{file} is no manifest of a dataset: its `schema` is {schema!r}, not {SCHEMA!r}"
    if schema.removeprefix("gvd/").split(".")[0] != SCHEMA.removeprefix("gvd/"):
        return f"{file} has schema {schema!r}, this version reads {SCHEMA!r}: ingest the data again"
    return None


def _paths_problem(manifest: Manifest, file: Path) -> str | None:
    """A manifest may come from anywhere; it must not make us open files outside its directory."""
    for name in (*manifest.files, manifest.tokenizer.file):
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            return f"{file} lists the file {name!r}, which is outside of the dataset"
    return None


def read_manifest(directory: Path) -> Manifest:
    """Read and check `directory/manifest.json`.

    Raises:
        DataError: the manifest is missing, damaged, or of another major schema.
    """
    file = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not a directory; "
            "prepare a dataset with `python -m tools.preprocess ingest`"
        )
    if not file.is_file():
        raise DataError(
            f"{directory} holds no {MANIFEST_FILE}, so it is not a prepared dataset "
            "(or its ingest was stopped); run `python -m tools.preprocess ingest` again"
        )
    try:
        raw = read_small(file)
        document = json.loads(raw)
        # Fails on NaN and half a surrogate pair, which are read and can never have been written.
        canonical = canonical_json(document)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also UnicodeDecodeError
        raise DataError(
            f"{file} is not valid JSON ({error}): the file is damaged, ingest the data again"
        ) from error
    if problem := _schema_problem(document, file):
        raise DataError(problem)
    if document.get("digest") != document_digest(document) or raw != canonical:
        raise DataError(
            f"{file} does not match its own digest: it was edited or damaged, ingest the data again"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{file}: field `{where}`: {first['msg']}; ingest the data again"
        ) from error
    if problem := _paths_problem(manifest, file):
        raise DataError(problem)
    return manifest


def write_manifest(directory: Path, document: dict[str, Any]) -> Manifest:
    """Add schema and digest to `document`, check it and write it; returns what readers will see."""
    document = {**document, "schema": SCHEMA}
    document["digest"] = document_digest(document)
    manifest = Manifest.model_validate(document)
    atomic_write(directory / MANIFEST_FILE, canonical_json(document))
    return manifest


def size_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Sentences about files that are missing or of another size than the manifest says."""
    problems = []
    for name in REQUIRED_FILES:
        if name not in manifest.files:
            problems.append(
                f"{directory / MANIFEST_FILE} does not list {name}: ingest the data again"
            )
    for name, info in manifest.files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path} is missing: copy the dataset whole, or ingest the data again")
        elif (size := path.stat().st_size) != info.bytes:
            problems.append(
                f"{path} has {size} bytes, the manifest says {info.bytes}: copy or ingest it again"
            )
    for name, count in (
        (SAMPLE_INDEX, manifest.counts.samples),
        (MEDIA_INDEX, manifest.counts.images),
    ):
        if name in manifest.files and manifest.files[name].bytes != count * RECORD_BYTES:
            problems.append(
                f"{directory / name} does not hold {count} records of {RECORD_BYTES} bytes"
            )
    return problems


def _tokenizer_problems(directory: Path, manifest: Manifest) -> list[str]:
    info = manifest.tokenizer
    path = directory / info.file
    if not path.is_file():
        return [f"the tokenizer file {path} is missing: copy the dataset whole, or ingest it again"]
    problems = []
    if (found := sha256_file(path)) != info.sha256:
        problems.append(
            f"the tokenizer file {path} has sha256 {found[:12]}..., the tokens were made with "
            f"{info.sha256[:12]}...: put the original file back, or ingest the data again"
        )
    for name in REQUIRED_SPECIALS:
        token = info.specials.get(name)
        if token is None or not 0 <= token < info.vocab_size:
            problems.append(
                f"{directory / MANIFEST_FILE}: tokenizer.specials.{name} is {token}, "
                f"it must be an id below the vocabulary size {info.vocab_size}"
            )
    return problems


def find_problems(path: Path, *, what: str) -> list[str]:
    """All that keeps `path` from being used as a dataset, as sentences that begin with `what`.

    Cheap: stat of each file and a hash of the tokenizer file; content is checked on reading and
    by `verify`. `what` names the setting, for example `data.train`.
    """
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return [f"{what}: {error}"]
    problems = size_problems(path, manifest) + _tokenizer_problems(path, manifest)
    if not problems and manifest.counts.samples == 0:
        problems.append(f"{path} holds no samples: every row was rejected, see {path / REJECTS}")
    return [f"{what}: {problem}" for problem in problems]
