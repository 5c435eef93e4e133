"""Several datasets behind one numbering of samples and images.

Sample i of dataset k has the number i + (samples of the datasets before k); images likewise. So a
single dataset keeps its own numbers, and no number stands for two things. The numbering depends on
the order of the datasets, which a resumed run must keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.data.dataset import Dataset, Gathered
from ghostvis_mega.data.pieces import (
    cut_gathered,
    image_positions,
    piece_images,
    piece_lengths,
    piece_trained,
)
from ghostvis_mega.utils.errors import DataError


@dataclass(frozen=True)
class DamagedSample:
    """A sample whose stored bytes do not match their crc; `sample` counts over all datasets."""

    sample: int
    problem: str


class Corpus:
    """Read access to datasets in a fixed order.

    Args:
        datasets: at least one; all tokenised alike.

    Raises:
        DataError: they were tokenised with different tokenizers.
    """

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = tuple(datasets)
        first = self.datasets[0]
        for other in self.datasets[1:]:
            if other.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
                raise DataError(
                    f"{other.path} was tokenised with another tokenizer than {first.path}: their "
                    "token ids mean different words. Ingest both with the same tokenizer."
                )
        self.sample_offsets = _offsets([dataset.num_samples for dataset in self.datasets])
        self.image_offsets = _offsets([dataset.num_images for dataset in self.datasets])

    @property
    def path(self) -> str:
        """Where the data lies, for messages."""
        return ", ".join(str(dataset.path) for dataset in self.datasets)

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return int(self.sample_offsets[-1])

    def dataset_of_sample(self, sample: int) -> int:
        """Number of the dataset that holds a sample."""
        return int(np.searchsorted(self.sample_offsets, sample, side="right")) - 1

    def dataset_of_image(self, image: int) -> int:
        """Number of the dataset that holds an image."""
        return int(np.searchsorted(self.image_offsets, image, side="right")) - 1

    def image_bytes(self, image: int) -> bytes:
        """Encoded bytes of an image; errors as `Dataset.image_bytes`."""
        number = self.dataset_of_image(image)
        return self.datasets[number].image_bytes(image - int(self.image_offsets[number]))

    def sample_key(self, sample: int) -> str:
        """Source key of a sample; DataError if it is damaged."""
        number = self.dataset_of_sample(sample)
        key, _ = self.datasets[number].sample_key(sample - int(self.sample_offsets[number]))
        return key

    def trained_tokens(self, sample: int, piece: tuple[int, int] | None = None) -> int:
        """Labels of a sample, or of a piece of it, under the loss, from the index."""
        number = self.dataset_of_sample(sample)
        local = np.array([sample - int(self.sample_offsets[number])])
        if piece is not None:
            return int(piece_trained(self.datasets[number], local, np.array([piece]))[0])
        return int(self.datasets[number].sample_index["trained_len"][local[0]])

    def images_of(self, sample: int) -> list[int]:
        """Images that a sample shows, from the index."""
        number = self.dataset_of_sample(sample)
        local = np.array([sample - int(self.sample_offsets[number])])
        ids, _ = self.datasets[number].image_ids(local)
        return (ids + int(self.image_offsets[number])).tolist()

    def lengths(self, *, tokens_per_image: int) -> np.ndarray:
        """Positions that each sample takes, images expanded: int64 [num_samples]."""
        return np.concatenate(
            [dataset.lengths(tokens_per_image=tokens_per_image) for dataset in self.datasets]
        )

    def piece_lengths(
        self,
        samples: Sequence[int],
        pieces: Sequence[tuple[int, int]],
        *,
        tokens_per_image: int,
    ) -> list[int]:
        """Positions that pieces of samples of one dataset take, images expanded."""
        number = self.dataset_of_sample(samples[0])
        local = np.array(samples, dtype=np.int64) - int(self.sample_offsets[number])
        found = piece_lengths(
            self.datasets[number], local, np.array(pieces), tokens_per_image=tokens_per_image
        )
        return found.tolist()

    def gather(
        self, samples: Sequence[int], pieces: Sequence[tuple[int, int]] = ()
    ) -> tuple[Gathered, list[DamagedSample]]:
        """Samples of one dataset end to end; a damaged one keeps its shape and trains nothing.

        With `pieces` (first token and number of tokens, one a sample), only those of them.

        In its place stand its images, and padding around them: what the index says it holds, so
        that other ranks, which planned by the index, need not know.

        Raises:
            DataError: records that contradict each other though their crc is right, or a damaged
                record that cannot be blanked.
        """
        number = self.dataset_of_sample(samples[0])
        dataset = self.datasets[number]
        offset, image_offset = int(self.sample_offsets[number]), int(self.image_offsets[number])
        local = np.array(samples, dtype=np.int64) - offset
        cuts = np.array(pieces, dtype=np.int64).reshape(-1, 2) if pieces else None
        try:
            data = dataset.gather(local)
            data = data if cuts is None else cut_gathered(data, cuts)
            return _shift_images(data, image_offset), []
        except DataError:
            bad = {index: dataset.crc_problem(index) for index in local.tolist()}
            if not any(bad.values()):
                raise
        parts = []
        for place, index in enumerate(local.tolist()):
            cut = None if cuts is None else cuts[[place]]
            if bad[index]:
                parts.append(_blank(dataset, index, cut))
            else:
                part = dataset.gather(np.array([index]))
                parts.append(part if cut is None else cut_gathered(part, cut))
        found = [DamagedSample(index + offset, text) for index, text in bad.items() if text]
        return _shift_images(_join(parts), image_offset), found


def _offsets(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _shift_images(gathered: Gathered, offset: int) -> Gathered:
    gathered.image_ids[...] += offset
    return gathered


def _blank(dataset: Dataset, index: int, cut: np.ndarray | None) -> Gathered:
    """The shape of a damaged sample or piece of one: its images where the index has them, else
    padding."""
    record = dataset.sample_index[index]
    length, images = int(record["tok_len"]), int(record["n_images"])
    if length < images or length > dataset.manifest.counts.tokens:
        raise DataError(
            f"sample {index} of {dataset.path}: its record is damaged beyond use: run "
            "`python -m tools.preprocess verify` and copy or ingest the dataset again"
        )
    image_ids = dataset.image_ids(np.array([index]))[0]
    if cut is not None:
        image_ids, counts = piece_images(dataset, np.array([index]), cut)
        length, images = int(cut[0, 1]), int(counts[0])
    specials = dataset.manifest.tokenizer.specials
    tokens = np.full(length, specials["pad"], dtype=np.int64)
    positions, _ = image_positions(dataset, np.array([index]), cut)
    tokens[positions] = specials["image"]
    return Gathered(
        tokens=tokens,
        trained=np.zeros(length, dtype=bool),
        tok_lens=np.array([length]),
        image_counts=np.array([images]),
        image_ids=image_ids,
        image_positions=positions,
    )


def _join(parts: list[Gathered]) -> Gathered:
    starts = _offsets([len(part.tokens) for part in parts])[:-1].tolist()
    return Gathered(
        tokens=np.concatenate([part.tokens for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        tok_lens=np.concatenate([part.tok_lens for part in parts]),
        image_counts=np.concatenate([part.image_counts for part in parts]),
        image_ids=np.concatenate([part.image_ids for part in parts]),
        image_positions=np.concatenate(
            [part.image_positions + start for part, start in zip(parts, starts, strict=True)]
        ),
    )
