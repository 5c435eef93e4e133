"""Recipes: everything about a dataset in one YAML file, for `build`.

    out: mix.gvd
    tokenizer: {vocab: 512}          # train one on the sources, or {file: tokenizer.json}
    template: chatml
    sources:
      - {format: easy-vqa, split: train}
      - {format: llava, path: rows.json, images: photos}
    plans:
      - {seq_length: 1024, tokens_per_image: 16}

Paths are relative to the recipe. An unknown key is an error.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ghostvis_mega.data.export.megatron import MegatronFiles
from ghostvis_mega.data.manifest import SCHEMA
from ghostvis_mega.data.plan import Algorithm, PlanParams, TooLong
from ghostvis_mega.data.readers.registry import SourceSpec, find_format
from ghostvis_mega.data.template import TEMPLATE_NAME, find_style
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import canonical_json


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerRecipe(_Part):
    """A tokenizer file, or the size of one to train on the text of all sources."""

    file: Path | None = None
    vocab: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizerRecipe":
        if (self.file is None) == (self.vocab is None):
            raise ValueError("give either `file` or `vocab`")
        return self


class PlanRecipe(_Part):
    """Parameters of one pack plan."""

    seq_length: int = Field(ge=1)
    tokens_per_image: int = Field(ge=1)
    algorithm: Algorithm = "balanced"
    seed: int = Field(default=0, ge=0)
    group_images: bool = True
    segment_align: int = Field(default=1, ge=1)
    too_long: TooLong = "drop"

    def params(self) -> PlanParams:
        """As the planner takes them."""
        return PlanParams(**self.model_dump())


class Recipe(_Part):
    """A dataset to build."""

    out: Path
    tokenizer: TokenizerRecipe
    template: str = TEMPLATE_NAME
    max_tokens: int | None = Field(default=None, ge=2)
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    plans: tuple[PlanRecipe, ...] = ()

    def key(self) -> str:
        """Identity of recipe and inputs: 16 hex digits of names, sizes and times of change.

        Of a folder of images only its own time counts, not those of its files.
        """
        files = [self.tokenizer.file]
        for source in self.sources:
            files += [source.annotations, source.images, *_row_files(source)]
        identity = {
            "schema": SCHEMA,
            "recipe": self.model_dump(mode="json"),
            "inputs": [_state(path) for path in files if path is not None],
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()[:16]


def _row_files(source: SourceSpec) -> list[Path]:
    """The files that hold the rows of a source: one, those of a folder, or a Megatron pair."""
    path = source.path
    if path is None:
        return []
    if source.format == "megatron":
        files = MegatronFiles.of(path)
        return [files.bin, files.idx, files.json]
    return [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]


def _state(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}, which the recipe names, cannot be read: {error.strerror}") from (
            error
        )
    return [str(path), found.st_size, found.st_mtime_ns]


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; its paths become absolute.

    Raises:
        DataError: with every wrong field.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems = [
            f"{path}: `{'.'.join(str(part) for part in found['loc']) or 'recipe'}`: {found['msg']}"
            for found in error.errors()
        ]
        raise DataError("\n".join(problems)) from error
    find_style(recipe.template)
    for number, source in enumerate(recipe.sources):
        find_format(source.format)
        if source.tokenizer is not None:
            raise DataError(
                f"{path}: `sources.{number}.tokenizer`: remove it, the recipe's tokenizer is used"
            )
    folder = path.resolve().parent
    tokenizer = recipe.tokenizer
    if tokenizer.file is not None:
        tokenizer = TokenizerRecipe(file=folder / tokenizer.file)
    sources = tuple(_absolute(source, folder, tokenizer.file) for source in recipe.sources)
    return recipe.model_copy(
        update={"out": folder / recipe.out, "sources": sources, "tokenizer": tokenizer}
    )


def _absolute(source: SourceSpec, folder: Path, tokenizer: Path | None) -> SourceSpec:
    paths = {
        name: folder / value
        for name in ("path", "images", "annotations")
        if (value := getattr(source, name)) is not None
    }
    return source.model_copy(update={**paths, "tokenizer": tokenizer})
