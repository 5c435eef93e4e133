"""What a recipe asks for beside the dataset: statistics and exports, made from it and kept fresh.

Each step has a key of its own, of the dataset and the settings. A step is up to date if it was done
with this key and its mark, one file of its output, still has the same bytes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.energon import export_energon
from ghostvis_mega.data.export.files import EXPORT_FILE, check_target
from ghostvis_mega.data.export.megatron import MegatronFiles, export_megatron
from ghostvis_mega.data.export.webdataset import export_webdataset
from ghostvis_mega.data.leftovers import clear_files, clear_leftovers
from ghostvis_mega.data.looks.stats_page import dataset_pictures, render_stats
from ghostvis_mega.data.recipe import ExportRecipe, Recipe, StatsRecipe
from ghostvis_mega.data.stats import dataset_stats
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import canonical_json, sha256_file, write_output

_MIB = 1 << 20


@dataclass(frozen=True)
class Step:
    """One output: what it is called, what decides it, and the file that proves it."""

    name: str
    settings: StatsRecipe | ExportRecipe
    marks: tuple[Path, ...]

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Files and directories that the step writes."""
        if isinstance(self.settings, StatsRecipe):
            return self.marks
        return self.settings.outputs()

    def key(self, digest: str) -> str:
        """Identity of the step for the dataset with this digest."""
        document = {"dataset": digest, "step": self.settings.model_dump(mode="json")}
        return hashlib.sha256(canonical_json(document)).hexdigest()[:16]

    def found(self) -> dict[str, str] | None:
        """SHA-256 of each mark as it is now; None if one is missing."""
        if not all(mark.is_file() for mark in self.marks):
            return None
        return {mark.name: sha256_file(mark) for mark in self.marks}


def steps_of(recipe: Recipe) -> Iterator[Step]:
    """In the order in which they are done."""
    for stats in recipe.stats:
        marks = tuple(path for path in (stats.html, stats.report) if path is not None)
        yield Step(f"stats {marks[0].name}", stats, marks)
    for export in recipe.exports:
        mark = export.out / EXPORT_FILE
        if export.format == "megatron":
            mark = MegatronFiles.of(export.out).json
        yield Step(f"export {export.out.name}", export, (mark,))


def is_done(step: Step, stamp: Mapping[str, Any], digest: str) -> bool:
    """The output is there as this very step made it."""
    done = stamp.get("steps", {}).get(str(step.marks[0]))
    return done is not None and done["key"] == step.key(digest) and done["marks"] == step.found()


def check_targets(step: Step, stamp: Mapping[str, Any], *, force: bool) -> None:
    """Refuse names that are taken by something that no build made, unless there is `force`.

    Raises:
        DataError: naming the file or directory.
    """
    steps = stamp.get("steps", {})
    made = {path for mark, done in steps.items() for path in done.get("outputs", [mark])}
    for path in step.outputs:
        if isinstance(step.settings, ExportRecipe) and step.settings.format != "megatron":
            check_target(path, force=force or str(path) in made)
        elif path.is_dir():
            raise DataError(f"{path} is a directory: give the name of a file")
        elif path.exists() and not (force or str(path) in made):
            raise DataError(
                f"{path} exists already and no build made it: give another name, remove it, or "
                "--force to replace it"
            )


def claim(step: Step) -> dict[str, Any]:
    """What the stamp says before the step begins: what it left when it was killed is ours."""
    return {"key": None, "marks": None, "outputs": [str(path) for path in step.outputs]}


def run_step(step: Step, recipe: Recipe) -> dict[str, Any]:
    """Make the output, whose names `check_targets` has found free; what the stamp remembers."""
    for path in step.outputs:
        clear_leftovers(path, file=EXPORT_FILE)
        clear_files(path)
    with Dataset.open(recipe.out) as dataset:
        if isinstance(step.settings, StatsRecipe):
            _stats(dataset, step.settings)
        else:
            _export(dataset, step.settings)
        key = step.key(dataset.manifest.digest)
        return {**claim(step), "key": key, "marks": step.found()}


def _stats(dataset: Dataset, settings: StatsRecipe) -> None:
    stats = dataset_stats(
        dataset,
        seq_length=settings.seq_length,
        tokens_per_image=settings.tokens_per_image,
        seed=settings.seed,
        data_parallel=settings.dp,
        segment_align=settings.segment_align,
        too_long=settings.too_long,
    )
    stats["path"] = dataset.path.name  # the same bytes wherever the dataset lies
    if settings.report is not None:
        write_output(settings.report, canonical_json(stats))
    if settings.html is not None:
        page = render_stats(stats, dataset_pictures(dataset, stats))
        write_output(settings.html, page.encode())


def _export(dataset: Dataset, settings: ExportRecipe) -> None:
    size, force = settings.shard_mib * _MIB, True  # `check_targets` came before
    if settings.format == "webdataset":
        export_webdataset(dataset, settings.out, shard_bytes=size, force=force)
    elif settings.format == "energon":
        export_energon(dataset, settings.out, split=settings.split, shard_bytes=size, force=force)
    else:
        export_megatron(
            dataset,
            settings.out,
            append_eod=settings.append_eod,
            skip_images=settings.skip_images,
            force=force,
        )
