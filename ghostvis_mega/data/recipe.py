"""Recipes: everything about a dataset in one YAML file, for `build`.

    out: mix.gvd
    tokenizer: {vocab: 512}          # train one on the sources, or {file: tokenizer.json}
    template: chatml
    sources:
      - {format: easy-vqa, split: train}
      - {format: llava, path: rows.json, images: photos}
    dedupe: {images: exact, text: exact}      # optional; `against: eval.gvd` drops what that holds
    plans:
      - {seq_length: 1024, tokens_per_image: 16}
    stats:
      - {seq_length: 1024, tokens_per_image: 16, html: stats.html, report: stats.json}
    exports:
      - {format: webdataset, out: shards}

Paths are relative to the recipe. An unknown key is an error.
"""

import hashlib
import os
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ghostvis_mega.data.export.megatron import MegatronFiles
from ghostvis_mega.data.inputs import content_of, input_files, state_of
from ghostvis_mega.data.manifest import MANIFEST_FILE, SCHEMA
from ghostvis_mega.data.operations.dedupe import Match
from ghostvis_mega.data.plan import Algorithm, PlanParams, TooLong
from ghostvis_mega.data.readers.registry import SourceSpec, check_settings
from ghostvis_mega.data.template import TEMPLATE_NAME, find_style
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import canonical_json, read_small


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


class _Sizes(_Part):
    """What decides packing in plans and statistics alike."""

    seq_length: int = Field(ge=1)
    tokens_per_image: int = Field(ge=1)
    segment_align: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if self.seq_length % self.segment_align:
            raise ValueError(
                f"seq_length={self.seq_length} is not a multiple of "
                f"segment_align={self.segment_align}"
            )
        return self


class PlanRecipe(_Sizes):
    """Parameters of one pack plan."""

    algorithm: Algorithm = "balanced"
    seed: int = Field(default=0, ge=0)
    group_images: bool = True
    too_long: TooLong = "drop"

    def params(self) -> PlanParams:
        """As the planner takes them."""
        return PlanParams(**self.model_dump())


class DedupeRecipe(_Part):
    """How alike samples must be to be dropped; see `operations.dedupe`.

    With `against`, what that dataset holds is dropped as well, and `ignore` is for this alone:
    among themselves samples are duplicates if both pictures and text are alike.
    """

    images: Match = "exact"
    text: Match = "exact"
    against: Path | None = None

    @model_validator(mode="after")
    def _something(self) -> "DedupeRecipe":
        if self.images == self.text == "ignore":
            raise ValueError("images and text are both ignored: nothing is left to compare")
        return self


class StatsRecipe(_Sizes):
    """Statistics as a page, as JSON, or both."""

    seed: int = Field(default=0, ge=0)
    dp: tuple[int, ...] = Field(default=(8, 32, 512), min_length=1)
    too_long: TooLong = "drop"
    html: Path | None = None
    report: Path | None = None

    @model_validator(mode="after")
    def _has_output(self) -> "StatsRecipe":
        if self.html is None and self.report is None:
            raise ValueError("give `html`, `report` or both: a file to write")
        return self


class ExportRecipe(_Part):
    """The dataset in the format of another program."""

    format: Literal["webdataset", "energon", "megatron"]
    out: Path
    split: str = "train"
    shard_mib: int = Field(default=512, ge=1)
    append_eod: bool = False
    skip_images: bool = False

    def outputs(self) -> tuple[Path, ...]:
        """Files and directories that the export writes."""
        if self.format == "megatron":
            files = MegatronFiles.of(self.out)
            return files.bin, files.idx, files.json
        return (self.out,)


class Recipe(_Part):
    """A dataset to build."""

    out: Path
    tokenizer: TokenizerRecipe
    template: str = TEMPLATE_NAME
    max_tokens: int | None = Field(default=None, ge=2)
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    dedupe: DedupeRecipe | None = None
    plans: tuple[PlanRecipe, ...] = ()
    stats: tuple[StatsRecipe, ...] = ()
    exports: tuple[ExportRecipe, ...] = ()

    def outputs(self) -> list[Path]:
        """All that a build writes."""
        pages = [path for each in self.stats for path in (each.html, each.report) if path]
        exports = [path for export in self.exports for path in export.outputs()]
        return [self.out, *pages, *exports]

    def named_inputs(self) -> list[Path]:
        """Files and folders that the recipe reads."""
        paths: list[Path | None] = [self.tokenizer.file]
        for source in self.sources:
            paths += [source.annotations, source.images, *_row_files(source)]
        if self.dedupe is not None:
            paths.append(self.dedupe.against)
        return [path for path in paths if path is not None]

    def inputs(self) -> list[Path]:
        """All files that decide the dataset, pictures included."""
        paths: list[Path | None] = [self.tokenizer.file]
        for source in self.sources:
            images = source.images
            if images is None and source.format == "csv" and source.path is not None:
                images = source.path.parent  # where the reader looks
            paths += [source.annotations, images, *_row_files(source)]
        if self.dedupe is not None and self.dedupe.against is not None:
            paths.append(self.dedupe.against / MANIFEST_FILE)
        return input_files(paths, skip=self.outputs())

    def key(self) -> str:
        """Identity of dataset settings and inputs: 16 hex digits of names, sizes and times."""
        identity = {
            "schema": SCHEMA,
            "recipe": self.model_dump(mode="json", exclude={"stats", "exports"}),
            "inputs": state_of(self.inputs()),
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()[:16]

    def content(self) -> str:
        """As `key`, but of the bytes of the inputs instead of their sizes and times."""
        identity = {
            "schema": SCHEMA,
            "recipe": self.model_dump(mode="json", exclude={"stats", "exports"}),
            "inputs": content_of(self.inputs()),
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
    return [path]


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; its paths become absolute.

    Raises:
        DataError: with every wrong field.
    """
    try:
        document = yaml.safe_load(read_small(path).decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: also of UTF-8
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
        check_settings(source)
        if source.tokenizer is not None:
            raise DataError(
                f"{path}: `sources.{number}.tokenizer`: remove it, the recipe's tokenizer is used"
            )
    folder = path.resolve().parent
    tokenizer = recipe.tokenizer
    if tokenizer.file is not None:
        tokenizer = TokenizerRecipe(file=folder / tokenizer.file)
    sources = tuple(_absolute(source, folder, tokenizer.file) for source in recipe.sources)
    placed = recipe.model_copy(
        update={
            "out": folder / recipe.out,
            "sources": sources,
            "tokenizer": tokenizer,
            "dedupe": recipe.dedupe and _placed(recipe.dedupe, folder, "against"),
            "stats": tuple(_placed(each, folder, "html", "report") for each in recipe.stats),
            "exports": tuple(_placed(each, folder, "out") for each in recipe.exports),
        }
    )
    _check_outputs(placed, path)
    return placed


def _check_outputs(recipe: Recipe, path: Path) -> None:
    """No output takes the place of an input, of the recipe, or of another output."""
    outputs = recipe.outputs()
    for number, output in enumerate(outputs):
        for read in (path, *recipe.named_inputs()):
            if _holds(output, read):
                raise DataError(
                    f"{path}: the output {output} would replace {read}, which the build reads: "
                    "give the output another name"
                )
        against = recipe.dedupe and recipe.dedupe.against
        if against and _holds(against, output):
            raise DataError(f"{path}: the output {output} lies inside {against}: put it elsewhere")
        for other in (*outputs[:number], *outputs[number + 1 :]):
            if output == other:
                raise DataError(f"{path}: two outputs have the name {output}: give each its own")
            if _holds(output, other):
                raise DataError(
                    f"{path}: the output {other} lies inside the output {output}: put it elsewhere"
                )


def _holds(outer: Path, inner: Path) -> bool:
    """`inner` is `outer` or lies in it, by name or where links lead."""
    for place in (os.path.abspath, os.path.realpath):  # both work for names that do not exist
        first, second = Path(place(outer)), Path(place(inner))
        if first == second or first in second.parents:
            return True
    return False


def _placed[P: _Part](part: P, folder: Path, *names: str) -> P:
    """The part with its paths below `folder`."""
    paths = {name: folder / value for name in names if (value := getattr(part, name)) is not None}
    return part.model_copy(update=paths)


def _absolute(source: SourceSpec, folder: Path, tokenizer: Path | None) -> SourceSpec:
    paths = {
        name: folder / value
        for name in ("path", "images", "annotations")
        if (value := getattr(source, name)) is not None
    }
    return source.model_copy(update={**paths, "tokenizer": tokenizer})
