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
from ghostvis_mega.data.export.files import EXPORT_FILE
from ghostvis_mega.data.export.megatron import MegatronFiles, export_megatron
from ghostvis_mega.data.export.webdataset import export_webdataset
from ghostvis_mega.data.leftovers import clear_files, clear_leftovers
from ghostvis_mega.data.looks.stats_page import dataset_pictures, render_stats
from ghostvis_mega.data.recipe import ExportRecipe, Recipe, StatsRecipe
from ghostvis_mega.data.stats import dataset_stats
from ghostvis_mega.utils.files import atomic_write, canonical_json, sha256_file

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
        if self.settings.format == "megatron":
            files = MegatronFiles.of(self.settings.out)
            return files.bin, files.idx, files.json
        return (self.settings.out,)

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


def run_step(
    step: Step, recipe: Recipe, stamp: Mapping[str, Any], *, force: bool
) -> dict[str, Any]:
    """Make the output; returns what the stamp remembers.

    Raises:
        DataError: the name is taken by something that no build made, and there is no `force`.
    """
    ours = str(step.marks[0]) in stamp.get("steps", {})
    for path in step.outputs:
        clear_leftovers(path, file=EXPORT_FILE)
        clear_files(path)
    with Dataset.open(recipe.out) as dataset:
        if isinstance(step.settings, StatsRecipe):
            _stats(dataset, step.settings)
        else:
            _export(dataset, step.settings, force=force or ours)
        return {"key": step.key(dataset.manifest.digest), "marks": step.found()}


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
    for path in (settings.html, settings.report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if settings.report is not None:
        atomic_write(settings.report, canonical_json(stats))
    if settings.html is not None:
        page = render_stats(stats, dataset_pictures(dataset, stats))
        atomic_write(settings.html, page.encode())


def _export(dataset: Dataset, settings: ExportRecipe, *, force: bool) -> None:
    size = settings.shard_mib * _MIB
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
