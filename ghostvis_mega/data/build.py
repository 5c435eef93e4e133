"""From a recipe to a dataset with its plans: killed at any moment, the next run goes on.

All work is in NAME.gvd.tmp-build-KEY, where KEY is the identity of recipe and inputs, and one
rename publishes it. Beside the dataset, .NAME.gvd.build.json says which KEY it was built for; it is
no part of the dataset, whose bytes depend on the inputs alone.
"""

import hashlib
import json
import logging
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.encode import EncoderSpec
from ghostvis_mega.data.ingest import Progress, store_rows
from ghostvis_mega.data.leftovers import BUILD_MARK, clear_leftovers, hold
from ghostvis_mega.data.manifest import MANIFEST_FILE, PLANS_DIRECTORY, Manifest, read_manifest
from ghostvis_mega.data.operations.copying import Dropped, Part, Piece, write_parts
from ghostvis_mega.data.operations.dedupe import DedupeParams, find_duplicates, find_leaks
from ghostvis_mega.data.plan import PLAN_FILE, build_plan, save_plan
from ghostvis_mega.data.readers.meter import Meters
from ghostvis_mega.data.readers.registry import open_source, source_text
from ghostvis_mega.data.recipe import DedupeRecipe, Recipe
from ghostvis_mega.data.template import ROLES, load_tokenizer
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer
from ghostvis_mega.data.writer import PROGRESS_FILE, DatasetWriter, check_target, publish
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import atomic_write_json

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 5.0
_STAMP = "stamp.json"
_TRAINED = "tokenizer.model"
_DATA, _DEDUPED = "data", "deduped"


@dataclass(frozen=True)
class Built:
    """A dataset that is as its recipe says."""

    path: Path
    manifest: Manifest
    plans: tuple[str, ...]
    up_to_date: bool
    steps: tuple[str, ...] = ()
    """Statistics and exports that were made, too."""


def build(
    recipe: Recipe,
    *,
    workers: int = 1,
    force: bool = False,
    check: bool = False,
    progress: Progress | None = None,
    meters: Meters | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Built:
    """Build what is not there yet.

    Args:
        meters: tells how much of the sources has been read.
        force: replace a dataset that no build made; build again what is up to date.
        check: compare the bytes of all inputs with those of the last build, not their sizes and
            times of change.
        checkpoint_seconds: at most so much work is lost when the process is killed.

    Raises:
        DataError: an input cannot be read, `out` is something else, or another build is at work.
    """
    out, key = recipe.out, recipe.key()
    content = recipe.content() if check else None
    stamp_file = _stamp_file(out)
    # With `check`, inputs may differ though their sizes and times do not.
    name = key if content is None else hashlib.sha256(f"{key}{content}".encode()).hexdigest()[:16]
    work = out.with_name(f"{out.name}{BUILD_MARK}{name}")
    clear_leftovers(out, keep=work)
    stamp = _read_stamp(stamp_file) or {}
    ours = bool(stamp) and _digest(out) == stamp["digest"]
    same = stamp.get("key") == key if content is None else stamp.get("content") == content
    fresh = ours and not force and same and _has_plans(out, stamp["plans"])
    if fresh and stamp["key"] != key:  # touched, but the same bytes
        stamp["key"] = key
        atomic_write_json(stamp_file, stamp)
    if fresh and work.exists():
        with hold(work):
            shutil.rmtree(work)
    if not fresh:
        with hold(work):
            ready = _read_stamp(work / _STAMP)
            published = ready is not None and not (work / ready.get("directory", _DATA)).exists()
            check_target(out, force=force or ours or published)
            if ready is None:
                ready = _prepare(recipe, work, key, workers, progress, meters, checkpoint_seconds)
                atomic_write_json(work / _STAMP, ready)
            if (work / ready.get("directory", _DATA)).exists():
                publish(work / ready.get("directory", _DATA), out)
            stamp = {**ready, "steps": stamp.get("steps", {})}
            atomic_write_json(stamp_file, stamp)
            shutil.rmtree(work)
    done = _run_steps(recipe, stamp, stamp_file, force=force)
    return Built(
        out, read_manifest(out), tuple(stamp["plans"]), up_to_date=fresh and not done, steps=done
    )


def check_build(recipe: Recipe, *, force: bool = False) -> tuple[str, ...]:
    """All outputs of a build that are not there yet or no longer right; for a dry run.

    Raises:
        DataError: a name is taken by something that no build made, and there is no `force`.
    """
    from ghostvis_mega.data import build_steps  # as in `_run_steps`

    out, stamp = recipe.out, _read_stamp(_stamp_file(recipe.out)) or {}
    ours = bool(stamp) and _digest(out) == stamp["digest"]
    fresh = ours and not force and stamp["key"] == recipe.key() and _has_plans(out, stamp["plans"])
    if not fresh:
        check_target(out, force=force or ours)
    names = [] if fresh else [out.name, *(f"plan {plan.algorithm}" for plan in recipe.plans)]
    for step in build_steps.steps_of(recipe):
        if force or not fresh or not build_steps.is_done(step, stamp, stamp["digest"]):
            build_steps.check_targets(step, stamp, force=force)
            names.append(step.name)
    return tuple(names)


def _stamp_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.build.json")


def _run_steps(
    recipe: Recipe, stamp: dict[str, Any], stamp_file: Path, *, force: bool
) -> tuple[str, ...]:
    """Statistics and exports that are missing or of another dataset; returns their names."""
    if not (recipe.stats or recipe.exports):
        return ()
    from ghostvis_mega.data import (
        build_steps,  # statistics import much, and most recipes do not ask
    )

    done = []
    for step in build_steps.steps_of(recipe):
        if force or not build_steps.is_done(step, stamp, stamp["digest"]):
            build_steps.check_targets(step, stamp, force=force)
            for entry in (build_steps.claim, partial(build_steps.run_step, recipe=recipe)):
                stamp["steps"] = {**stamp.get("steps", {}), str(step.marks[0]): entry(step)}
                atomic_write_json(stamp_file, stamp)
            done.append(step.name)
    return tuple(done)


def _read_stamp(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_bytes()) if path.is_file() else None


def _digest(out: Path) -> str | None:
    return read_manifest(out).digest if (out / MANIFEST_FILE).is_file() else None


def _has_plans(out: Path, plans: list[str]) -> bool:
    return all((out / PLANS_DIRECTORY / name / PLAN_FILE).is_file() for name in plans)


def _prepare(
    recipe: Recipe,
    work: Path,
    key: str,
    workers: int,
    progress: Progress | None,
    meters: Meters | None,
    checkpoint_seconds: float,
) -> dict[str, Any]:
    """Rows and plans into a directory of `work`; returns the stamp."""
    content = recipe.content()
    tokenizer = _tokenizer(recipe, work)
    spec = EncoderSpec(
        tokenizer.path, tokenizer.info(file=tokenizer.file_name), recipe.template, recipe.max_tokens
    )
    sources = [open_source(source, meters) for source in recipe.sources]
    with _writer(recipe, work, tokenizer) as writer:
        if writer.rows_done:
            log.warning("%s: going on after %d rows", recipe.out, writer.rows_done)
        last = time.monotonic()

        def after_block(rows: int, rejected: int) -> None:
            nonlocal last
            if time.monotonic() - last >= checkpoint_seconds:
                writer.checkpoint()
                last = time.monotonic()
            if progress is not None:
                progress(rows, rejected)

        store_rows(
            sources,
            writer,
            spec=spec,
            workers=workers,
            skip=writer.rows_done,
            progress=after_block,
        )
        writer.checkpoint()
    for reason, times in sorted(writer.reasons.items()):
        log.warning("%s: %d rows rejected: %s", recipe.out, times, reason)
    directory = _DATA
    if recipe.dedupe is not None:
        directory = _DEDUPED
        _dedupe(recipe.dedupe, work)
    plans = []
    with Dataset.open(work / directory) as dataset:
        for plan in recipe.plans:
            plans.append(save_plan(dataset, build_plan(dataset, plan.params())).name)
        return {
            "key": key,
            "content": content,
            "digest": dataset.manifest.digest,
            "directory": directory,
            "plans": plans,
        }


def _dedupe(settings: DedupeRecipe, work: Path) -> None:
    """From `work/data` to `work/deduped`, with the ledger of both.

    What an evaluation set holds is dropped first, then what is left twice.
    """
    params = DedupeParams(images=settings.images, text=settings.text)
    dropped: tuple[Dropped, ...] = ()
    what = f"dedupe images={settings.images} text={settings.text}"
    with ExitStack() as stack:
        dataset = stack.enter_context(Dataset.open(work / _DATA))
        if settings.against is not None:
            other = stack.enter_context(Dataset.open(settings.against))
            what += f" against={other.manifest.digest}"
            dropped = find_leaks(dataset, other, params).dropped
            # A leak by its picture alone is one; a picture with another question is no duplicate.
            params = DedupeParams(
                images="exact" if settings.images == "ignore" else settings.images,
                text="exact" if settings.text == "ignore" else settings.text,
            )
        found = find_duplicates(dataset, params, without={one.index for one in dropped})
        dropped = tuple(sorted(dropped + found.dropped, key=lambda one: one.index))
        piece = Piece(dataset, found.keep, dropped, with_ledger=True)
        write_parts([Part(work / _DEDUPED, (piece,), what)], force=True)


def _tokenizer(recipe: Recipe, work: Path) -> Tokenizer:
    file = recipe.tokenizer.file
    if file is None:
        file, vocab = work / _TRAINED, recipe.tokenizer.vocab
        if not file.is_file() and vocab is not None:
            lines = chain.from_iterable(source_text(source) for source in recipe.sources)
            train_tokenizer(chain(lines, ROLES), vocab_size=vocab, path=file)
    return load_tokenizer(file, template=recipe.template)


def _writer(recipe: Recipe, work: Path, tokenizer: Tokenizer) -> DatasetWriter:
    """A writer that goes on after the last checkpoint, or from the start if that is damaged."""
    described = [
        {"name": source.name, "license": source.license}
        for source in (open_source(spec) for spec in recipe.sources)
    ]

    def make() -> DatasetWriter:
        return DatasetWriter(
            recipe.out,
            tokenizer=tokenizer,
            template=recipe.template,
            sources=described,
            force=True,  # `build` has checked the target
            work=work,
        )

    try:
        return make()
    except DataError:
        raise
    except (ValueError, KeyError, OSError) as error:
        log.warning("%s: the last checkpoint is damaged (%s): from the start", work, error)
        (work / PROGRESS_FILE).unlink(missing_ok=True)
        return make()
