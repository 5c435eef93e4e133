"""From a prepared dataset to what one rank needs for a step, read ahead while the step before
runs."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import GlobalBatch
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_image
from ghostvis_mega.data.pixels import ImageError
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.errors import DataError


def load_pixels(
    dataset: Dataset, image_ids: Sequence[int], *, size: int, seeds: Sequence[int] | None
) -> torch.Tensor:
    """Decoded pictures: uint8 [n, 3, size, size].

    Args:
        dataset: Holds them.
        image_ids: Which.
        size: Side in pixels.
        seeds: One a picture for random augmentation; None shows them as they are.

    Raises:
        DataError: A picture is damaged; names it.
    """
    pictures = []
    for index, image in enumerate(image_ids):
        try:
            seed = None if seeds is None else seeds[index]
            pictures.append(
                load_image(dataset.image_bytes(image), image_size=size, augment_seed=seed)
            )
        except ImageError as error:
            raise DataError(f"image {image} of {dataset.path} cannot be used: {error}") from error
    return torch.stack(pictures) if pictures else torch.zeros((0, 3, size, size), dtype=torch.uint8)


class Feed:
    """Inputs of this rank by step: a function of the step alone, so a resumed run needs no state.

    Args:
        run: Settings.
        groups: Of this rank.
        dataset: To train on.
    """

    def __init__(self, run: RunConfig, groups: Groups, dataset: Dataset):
        self.run, self.groups, self.dataset = run, groups, dataset
        self.source = BatchSource(
            dataset,
            seq_length=run.data.seq_length,
            global_size=run.batch.global_size,
            micro_size=run.batch.micro_size,
            data_parallel=groups.degrees.data,
            packing=run.data.packing,
            tokens_per_image=run.model.tokens_per_image,
            seed=run.train.seed,
        )
        self.sample_lengths = dataset.lengths(tokens_per_image=run.model.tokens_per_image)
        """int64 [samples]: positions that each sample takes."""
        workers = run.data.num_workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="feed") if workers else None
        self._ahead: dict[int, Future[tuple[GlobalBatch, StepInput]]] = {}

    def get(self, step: int) -> tuple[GlobalBatch, StepInput]:
        """The batch of `step`, counted from 0; with workers, the next ones are then being read."""
        if self._pool is None:
            return self._read(step)
        last = min(step + self.run.data.num_workers, self.run.train.steps - 1)
        for number in range(step, max(step, last) + 1):
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(self._read, number)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, step: int) -> tuple[GlobalBatch, StepInput]:
        batch = self.source.global_batch(step)
        wanted = [
            [image for micro in replica for row in micro for image in row.image_ids]
            for replica in batch.replicas
        ]
        dispatch = dispatch_images(wanted, self.groups.places)
        own = dispatch.encode[self.groups.rank]
        seeds = None
        if self.run.data.augment:
            seeds = [
                augment_seed(self.run.train.seed, epoch=batch.epoch, image=image) for image in own
            ]
        vision = self.run.model.vision
        return batch, StepInput(
            micro_batches=[
                self.source.micro_batch(micro) for micro in batch.replicas[self.groups.place.data]
            ],
            dispatch=dispatch,
            pixels_N3hw=load_pixels(
                self.dataset, own, size=vision.image_size if vision else 1, seeds=seeds
            ),
            trained_tokens=batch.trained_tokens,
        )


def augment_seed(seed: int, *, epoch: int, image: int) -> int:
    """Seed of one picture's augmentation in one epoch."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
