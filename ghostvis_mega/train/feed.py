"""From prepared datasets to what one rank needs for a step, read ahead while the step before
runs."""

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ghostvis_mega.config.schema import DataConfig, RunConfig
from ghostvis_mega.data import state as data_state
from ghostvis_mega.data.bad_samples import LEDGER, BadSamples
from ghostvis_mega.data.batch import Damage, GlobalBatch, SequenceMeta
from ghostvis_mega.data.blend import BlendWeights
from ghostvis_mega.data.corpus import DamagedSample
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_pixels
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.model.flops import BatchFlops, batch_flops
from ghostvis_mega.parallel.dispatch import ImageDispatch, dispatch_images
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.image_rows import ImageRows, image_rows
from ghostvis_mega.parallel.windows import PictureWindow, cut_windows
from ghostvis_mega.utils.errors import DataError

_LOOK_AHEAD = 32
"""Steps in which pictures are counted before a run."""


def blend_weights(data: DataConfig) -> BlendWeights | None:
    """The weights as the settings state them; None with one dataset."""
    if not data.blend:
        return None
    first = (0, tuple(entry.weight for entry in data.blend))
    changes = [(change.step, change.weights) for change in data.blend_changes]
    return BlendWeights(unit=data.blend_unit, changes=(first, *changes))


class Feed:
    """Inputs of this rank by step: a function of the step alone, so a resumed run needs no state
    but the proof that it reads the same data.

    A damaged sample, or one that shows a damaged picture, keeps its shape and trains nothing: this
    rank notes the damage in `rejected_at_run_time.jsonl`, counts it against a budget and tells the
    others (`train.damage`).

    Args:
        run: Settings.
        groups: Of this rank.
        dataset: That of `data.train`; the others of `data.blend` are opened here.
    """

    def __init__(self, run: RunConfig, groups: Groups, dataset: Dataset):
        self.run, self.groups = run, groups
        datasets = [
            dataset if entry.path == run.data.train else Dataset.open(entry.path)
            for entry in run.data.blend
        ] or [dataset]
        self.source = BatchSource(
            datasets,
            seq_length=run.data.seq_length,
            global_size=run.batch.global_size,
            micro_size=run.batch.micro_size,
            data_parallel=groups.degrees.data,
            packing=run.data.packing,
            tokens_per_image=run.model.tokens_per_image,
            seed=run.train.seed,
            algorithm=run.data.pack_algorithm,
            too_long=run.data.too_long,
            segment_align=run.segment_align,
            blend=blend_weights(run.data),
            on_damage=self._note_sample,
        )
        self.corpus = self.source.corpus
        self.bad_samples = BadSamples(
            run.log.output / LEDGER,
            budget=run.data.bad_sample_budget,
            num_samples=self.corpus.num_samples,
            rank=groups.rank,
            data=data_state.identity(self.source),
        )
        self._sample_lengths = self.corpus.lengths(tokens_per_image=run.model.tokens_per_image)
        workers = run.data.num_workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="feed") if workers else None
        self._reading = threading.local()
        self._ahead: dict[int, Future[tuple[GlobalBatch, StepInput]]] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: JSON below 1 KB, the same at every step but for the
        number of damaged samples."""
        return {**data_state.describe(self.source), "bad_samples": self.bad_samples.count}

    def check_state(self, state: dict[str, Any], *, step: int) -> None:
        """Make sure that a checkpoint taken after `step` steps continues this very stream, and go
        on counting damaged samples.

        Raises:
            CheckpointError: names every difference.
            DataError: the run has found more damaged samples than it may.
        """
        data_state.check(state, self.source, step=step)
        self.bad_samples.resume(int(state.get("bad_samples", 0)))

    def get(self, step: int) -> tuple[GlobalBatch, StepInput]:
        """The batch of `step`, counted from 0; with workers, the next ones are then being read."""
        if self._pool is None:
            return self._read(step)
        last = min(step + self.run.data.num_workers, self.run.train.steps - 1)
        for number in range(step, max(step, last) + 1):
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(self._read, number)
        return self._ahead.pop(step).result()

    def lengths(self, row: SequenceMeta) -> list[int]:
        """Positions that each sample of a sequence takes, images expanded."""
        width = self.run.model.tokens_per_image
        if row.pieces:
            return self.corpus.piece_lengths(row.sample_ids, row.pieces, tokens_per_image=width)
        return self._sample_lengths[list(row.sample_ids)].tolist()

    def flops(self, batch: GlobalBatch) -> BatchFlops:
        """Operations that training on a batch takes, over all ranks; those run twice are not
        counted."""
        return batch_flops(
            self.run.model,
            segments=[length for row in batch.sequences for length in self.lengths(row)],
            head_rows=batch.trained_tokens,
            num_images=len(batch.image_ids),
            trained=self.run.trained_modules,
        )

    def most_pictures(self) -> int:
        """Most that any rank encodes at a time (`tower.window`) in the first steps, and a tenth
        more, as later packs may hold; no picture is read."""
        most, ranks = 0, len(self.groups.places)
        for step in range(min(_LOOK_AHEAD, self.run.train.steps)):
            replicas = self.source.global_batch(step).replicas
            for part in cut_windows(len(replicas[0]), self.run.tower.window):
                shown = {
                    image
                    for replica in replicas
                    for micro in replica[part]
                    for row in micro
                    for image in row.image_ids
                }
                most = max(most, -(-len(shown) // ranks))
        return -(-most * 11 // 10)

    def own_images(self, dispatch: ImageDispatch, wanted: list[list[int]]) -> Sequence[int]:
        """The pictures that this rank decodes: those that it encodes, ascending.

        Args:
            dispatch: Which rank encodes what.
            wanted: What each replica shows, slot by slot.
        """
        return dispatch.encode[self.groups.rank]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, step: int) -> tuple[GlobalBatch, StepInput]:
        samples, images = self._reading.found = (set(), set())
        batch = self.source.global_batch(step)
        micro_batches = [
            self.source.micro_batch(micro) for micro in batch.replicas[self.groups.place.data]
        ]
        windows = [
            self._window(batch, part)
            for part in cut_windows(len(batch.replicas[0]), self.run.tower.window)
        ]
        return batch, StepInput(
            micro_batches=micro_batches,
            windows=windows,
            trained_tokens=batch.trained_tokens,
            damage=Damage(samples=frozenset(samples), images=frozenset(images)),
            step=step,
        )

    def _window(self, batch: GlobalBatch, part: slice) -> PictureWindow:
        replicas = [replica[part] for replica in batch.replicas]
        wanted = [
            [image for micro in replica for row in micro for image in row.image_ids]
            for replica in replicas
        ]
        # All pictures are resized to the tower's size and cost the same: no `patches`.
        dispatch = dispatch_images(wanted, self.groups.places)
        own = self.own_images(dispatch, wanted)
        seeds = None
        if self.run.data.augment:
            seeds = [
                augment_seed(
                    self.run.train.seed,
                    epoch=batch.epochs[self.corpus.dataset_of_image(image)],
                    image=image,
                )
                for image in own
            ]
        vision = self.run.model.vision
        pixels_N3hw = load_pixels(
            self.corpus,
            own,
            size=vision.image_size if vision else 1,
            seeds=seeds,
            on_damage=self._note_image,
        )
        return PictureWindow(
            num_micro_batches=len(replicas[0]),
            dispatch=dispatch,
            pixels_N3hw=pixels_N3hw,
            image_rows=self._image_rows(replicas),
        )

    def _image_rows(self, replicas: Sequence[Sequence[Sequence[SequenceMeta]]]) -> ImageRows | None:
        context = self.groups.degrees.context
        if context == 1:
            return None
        layouts = [
            [self.source.layout(row) for micro in replica for row in micro if row.image_ids]
            for replica in replicas
        ]
        width = self.run.model.tokens_per_image
        return image_rows(layouts, tokens_per_image=width, context=context)

    def _note_sample(self, damaged: DamagedSample) -> None:
        self._reading.found[0].add(damaged.sample)
        try:
            key = self.corpus.sample_key(damaged.sample)
        except (DataError, UnicodeDecodeError, ValueError):
            key = ""  # its key is damaged as well; the number still finds it
        self.bad_samples.note("sample", damaged.sample, key=key, problem=damaged.problem)

    def _note_image(self, image: int, problem: str) -> None:
        self._reading.found[1].add(image)
        self.bad_samples.note("image", image, key="", problem=problem)


def augment_seed(seed: int, *, epoch: int, image: int) -> int:
    """Seed of one picture's augmentation in one epoch."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
