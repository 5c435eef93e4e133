"""Batches as a pure function of the step: no state, no process group, the same on every rank.

Sequences are numbered without end: number n is position n % P of epoch n // P, where P is the
number of packs. Step k takes numbers k*G to (k+1)*G - 1, so a batch is always full and may reach
into the next epoch; its epoch is that of its first sequence.
"""

import logging

import numpy as np
import torch

from ghostvis_mega.data.batch import GlobalBatch, ImageSlot, MicroBatch, SequenceMeta
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.order import permute
from ghostvis_mega.data.plan import PackPlan, PlanParams, load_or_build
from ghostvis_mega.utils.errors import ConfigError

log = logging.getLogger(__name__)


class BatchSource:
    """Turns a dataset into global batches and micro-batches."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seq_length: int,
        global_size: int,
        micro_size: int,
        data_parallel: int,
        packing: bool,
        tokens_per_image: int,
        seed: int,
        group_images: bool = True,
    ):
        """Plan the dataset, or use its stored plan with the same parameters.

        Args:
            global_size: sequences of one step over all ranks.
            micro_size: rows of one micro-batch; 1 with packing.
            group_images: samples of one picture share a pack where that costs nothing.

        Raises:
            ConfigError: sizes that do not divide, or packed rows side by side.
            DataError: no sample fits, or the dataset has images and the model no place for them.
        """
        _check_sizes(global_size, micro_size, data_parallel, packing)
        self.dataset = dataset
        self.seq_length = seq_length
        self.packing = packing
        self._global_size, self._micro_size, self._data_parallel = (
            global_size,
            micro_size,
            data_parallel,
        )
        self._tokens_per_image, self._seed = tokens_per_image, seed
        params = PlanParams(
            algorithm="balanced" if packing else "none",
            seq_length=seq_length,
            tokens_per_image=tokens_per_image,
            seed=seed,
            group_images=group_images,
        )
        self.plan: PackPlan = load_or_build(dataset, params)
        specials = dataset.manifest.tokenizer.specials
        self._pad, self._image = specials["pad"], specials["image"]
        log.info(
            "%s: %d samples in %d sequences of %d, %.2f %% full, %d samples too long",
            dataset.path, len(self.plan.samples), self.plan.num_packs, seq_length,
            100 * self.plan.fill, len(self.plan.dropped),
        )  # fmt: skip

    def global_batch(self, step: int) -> GlobalBatch:
        """The sequences of a step; their set does not depend on `data_parallel`."""
        packs = self.plan.num_packs
        numbers = np.arange(step * self._global_size, (step + 1) * self._global_size)
        epochs, places = numbers // packs, numbers % packs
        order = np.concatenate(
            [
                permute(places[epochs == epoch], count=packs, seed=self._seed, epoch=int(epoch))
                for epoch in np.unique(epochs)
            ]
        )
        sequences = [self._meta(int(pack)) for pack in order]
        costs = np.array(
            [(row.num_tokens, len(set(row.image_ids))) for row in sequences], dtype=np.float64
        )
        replicas = []
        for members in balance(costs, bins=self._data_parallel):
            micro_batches = balance(costs[members], bins=len(members) // self._micro_size)
            replicas.append(
                tuple(tuple(sequences[members[i]] for i in micro) for micro in micro_batches)
            )
        return GlobalBatch(step=step, epoch=int(epochs[0]), replicas=tuple(replicas))

    def _meta(self, pack: int) -> SequenceMeta:
        samples = self.plan.pack(pack)
        image_ids, _ = self.dataset.image_ids(samples)
        return SequenceMeta(
            sample_ids=tuple(samples.tolist()),
            num_tokens=int(self.plan.tokens[pack]),
            trained_tokens=int(self.dataset.sample_index["trained_len"][samples].sum()),
            image_ids=tuple(image_ids.tolist()),
        )

    def micro_batch(self, rows: tuple[SequenceMeta, ...]) -> MicroBatch:
        """Tensors of the given rows; reads their tokens and checks them.

        Raises:
            DataError: a stored sample is damaged.
        """
        shape = (len(rows), self.seq_length)
        tokens_BS = np.full(shape, self._pad, dtype=np.int64)
        labels_BS = np.zeros(shape, dtype=np.int64)
        weights_BS = np.zeros(shape, dtype=np.float32)
        positions_BS = np.zeros(shape, dtype=np.int64)
        images: list[ImageSlot] = []
        segments = np.zeros(0, dtype=np.int64)
        for number, row in enumerate(rows):
            views = (tokens_BS[number], labels_BS[number], weights_BS[number], positions_BS[number])
            segments, slots = self._fill_row(number, row.sample_ids, *views)
            images += slots
        cu_seqlens, longest = None, self.seq_length
        if self.packing:
            cu_seqlens = torch.from_numpy(
                np.concatenate([[0], np.cumsum(segments)]).astype(np.int32)
            )
            longest = int(segments.max())
        return MicroBatch(
            tokens_BS=torch.from_numpy(tokens_BS),
            labels_BS=torch.from_numpy(labels_BS),
            weights_BS=torch.from_numpy(weights_BS),
            positions_BS=torch.from_numpy(positions_BS),
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
            images=tuple(images),
            sample_ids=tuple(sample for row in rows for sample in row.sample_ids),
        )

    def _fill_row(
        self,
        number: int,
        sample_ids: tuple[int, ...],
        tokens_S: np.ndarray,
        labels_S: np.ndarray,
        weights_S: np.ndarray,
        positions_S: np.ndarray,
    ) -> tuple[np.ndarray, list[ImageSlot]]:
        """Write one row in place; returns segment lengths (padding tail included) and slots."""
        data = self.dataset.gather(np.array(sample_ids, dtype=np.int64))
        width = self._tokens_per_image
        repeats = np.ones(len(data.tokens), dtype=np.int64)
        repeats[data.image_positions] = width
        tokens = np.repeat(data.tokens, repeats)
        trained = np.repeat(data.trained, repeats)
        used = len(tokens)
        lengths = data.tok_lens + data.image_counts * (width - 1)
        ends = np.cumsum(lengths)
        # The label of a position is the next token, except at a sample's end: what follows there
        # belongs to another sample.
        weighted = np.zeros(used, dtype=bool)
        weighted[:-1] = trained[1:]
        weighted[ends - 1] = False
        tokens_S[:used] = tokens
        labels_S[: used - 1] = np.where(weighted[:-1], tokens[1:], 0)
        weights_S[:used] = weighted
        segments = lengths
        if used < self.seq_length:
            segments = np.append(lengths, self.seq_length - used)
        positions_S[:] = np.arange(self.seq_length) - np.repeat(
            np.cumsum(segments) - segments, segments
        )
        starts = data.image_positions + np.arange(len(data.image_positions)) * (width - 1)
        slots = [
            ImageSlot(image_id=image_id, row=number, start=start)
            for image_id, start in zip(data.image_ids.tolist(), starts.tolist(), strict=True)
        ]
        return segments, slots


def _check_sizes(global_size: int, micro_size: int, data_parallel: int, packing: bool) -> None:
    problems = []
    if global_size % (micro_size * data_parallel):
        problems.append(
            f"batch.global_size={global_size} is not a multiple of batch.micro_size={micro_size} "
            f"times the data-parallel size {data_parallel}: change one of them"
        )
    if packing and micro_size != 1:
        problems.append(
            f"batch.micro_size={micro_size} with data.packing=true: a packed sequence is "
            "a micro-batch of its own, set batch.micro_size=1 or data.packing=false"
        )
    if problems:
        raise ConfigError(problems)


def balance(costs: np.ndarray, *, bins: int) -> list[list[int]]:
    """Spread items over bins: equal counts, and both costs even.

    Greedy: the costliest item first, into the bin with room whose larger normalised load stays
    smallest. Deterministic; ties go to the lower number.

    Args:
        costs: float64 [items, 2]; the number of items is a multiple of `bins`.

    Returns:
        Item numbers of each bin, ascending within a bin.
    """
    share = costs / np.maximum(costs.sum(axis=0), 1.0)
    room = np.full(bins, len(costs) // bins)
    loads = np.zeros((bins, 2))
    members: list[list[int]] = [[] for _ in range(bins)]
    for item in np.argsort(-share.max(axis=1), kind="stable").tolist():
        worst = (loads + share[item]).max(axis=1)
        chosen = int(np.argmin(np.where(room > 0, worst, np.inf)))
        loads[chosen] += share[item]
        room[chosen] -= 1
        members[chosen].append(item)
    return [sorted(member) for member in members]
