"""Batches as a pure function of the step: no state, no process group, the same on every rank.

Sequences are numbered without end; step k takes numbers k*G to (k+1)*G - 1. With one dataset of P
packs, number n is place n % P of epoch n // P, so a batch is always full and may reach into the
next epoch. With several, `blend` says which dataset a number belongs to and how many of that
dataset came before; epochs are then counted for each dataset by itself.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ghostvis_mega.data.batch import (
    GlobalBatch,
    ImageSlot,
    MicroBatch,
    SequenceLayout,
    SequenceMeta,
)
from ghostvis_mega.data.blend import BlendOrder, BlendWeights, Phase
from ghostvis_mega.data.corpus import Corpus, DamagedSample
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.order import permute
from ghostvis_mega.data.pieces import image_positions, piece_images, piece_trained
from ghostvis_mega.data.plan import (
    Algorithm,
    PackPlan,
    PlanParams,
    TooLong,
    align_up,
    check_alignment,
    load_or_build,
)
from ghostvis_mega.utils.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_TOO_UNEVEN, _MANY_BINS = 1.05, 8
"""Most loaded bin over the mean bin, and number of bins, from which another way of dealing is
tried. With fewer bins the first way stays, and with it the batches of small runs."""

_SOURCE_KEY_BITS = 40
"""Datasets of one size must not run in step: each permutes by a seed of its own."""


class BatchSource:
    """Turns one or several datasets into global batches and micro-batches.

    Ids in batches count over all datasets; see `Corpus`. A pack holds samples of one dataset.
    """

    def __init__(
        self,
        datasets: Dataset | Sequence[Dataset],
        *,
        seq_length: int,
        global_size: int,
        micro_size: int,
        data_parallel: int,
        packing: bool,
        tokens_per_image: int,
        seed: int,
        group_images: bool = True,
        segment_align: int = 1,
        algorithm: Algorithm = "balanced",
        too_long: TooLong = "drop",
        blend: BlendWeights | None = None,
        on_damage: Callable[[DamagedSample], None] | None = None,
    ):
        """Plan the datasets, or use their stored plans with the same parameters.

        Args:
            global_size: sequences of one step over all ranks.
            micro_size: rows of one micro-batch; 1 with packing.
            group_images: samples of one picture share a pack where that costs nothing.
            segment_align: in packed rows every segment, the tail too, is a multiple of so many
                positions; what a sample leaves of its last multiple is padding inside its segment,
                where positions run on and nothing is trained. 2 * CP for context parallelism.
            algorithm: how samples share packed sequences; rows without packing hold one each.
            too_long: what becomes of samples longer than a sequence; see `PlanParams`.
            blend: shares of several datasets.
            on_damage: told of each sample that was blanked because its crc is wrong; None lets
                damage stop the reading.

        Raises:
            ConfigError: sizes that do not divide, packed rows side by side, or too small a weight.
            DataError: no sample fits, the dataset has images and the model no place for them,
                tokenizers differ, or `seq_length` is not a multiple of `segment_align`.
        """
        _check_sizes(global_size, micro_size, data_parallel, packing)
        check_alignment(seq_length, segment_align)
        self.corpus = Corpus([datasets] if isinstance(datasets, Dataset) else datasets)
        self.seq_length = seq_length
        self.packing = packing
        self._global_size, self._micro_size, self._data_parallel = (
            global_size,
            micro_size,
            data_parallel,
        )
        self._tokens_per_image, self._seed = tokens_per_image, seed
        self.params = PlanParams(
            algorithm=algorithm if packing else "none",
            seq_length=seq_length,
            tokens_per_image=tokens_per_image,
            seed=seed,
            group_images=group_images,
            segment_align=segment_align,
            too_long=too_long,
        )
        self._align = segment_align if packing else 1
        self.plans: tuple[PackPlan, ...] = tuple(
            load_or_build(dataset, self.params) for dataset in self.corpus.datasets
        )
        phases = [Phase(start=0, quotas=(1,))]
        if blend is not None:
            phases = blend.phases(self.plans, global_size=global_size)
        if len(phases[0].quotas) != len(self.plans):
            raise ConfigError([f"{len(self.plans)} datasets need as many weights in data.blend"])
        self.order = BlendOrder(phases, seed=seed)
        self._on_damage = on_damage
        specials = self.corpus.datasets[0].manifest.tokenizer.specials
        self._pad, self._image = specials["pad"], specials["image"]
        for dataset, plan in zip(self.corpus.datasets, self.plans, strict=True):
            _log_plan(dataset, plan)

    @property
    def plan(self) -> PackPlan:
        """Plan of the first dataset."""
        return self.plans[0]

    @property
    def global_size(self) -> int:
        """Sequences of one step."""
        return self._global_size

    def global_batch(self, step: int) -> GlobalBatch:
        """The sequences of a step; their set does not depend on `data_parallel`."""
        numbers = np.arange(step * self._global_size, (step + 1) * self._global_size)
        sources, places = self.order.locate(numbers)
        packs = np.empty_like(places)
        for source in np.unique(sources).tolist():
            packs[sources == source] = self._packs(source, places[sources == source])
        sequences = [
            self.sequence(source, pack)
            for source, pack in zip(sources.tolist(), packs.tolist(), strict=True)
        ]
        costs = np.array(
            [(row.num_tokens, len(set(row.image_ids))) for row in sequences], dtype=np.float64
        )
        replicas = []
        for members in balance(costs, bins=self._data_parallel):
            micro_batches = balance(costs[members], bins=len(members) // self._micro_size)
            replicas.append(
                tuple(tuple(sequences[members[i]] for i in micro) for micro in micro_batches)
            )
        sizes = np.array([plan.num_packs for plan in self.plans])
        epochs = self.order.consumed(step * self._global_size) // sizes
        return GlobalBatch(step=step, epochs=tuple(epochs.tolist()), replicas=tuple(replicas))

    def _packs(self, source: int, places: np.ndarray) -> np.ndarray:
        """Packs of one dataset at places of its own endless stream."""
        count = self.plans[source].num_packs
        seed = self._seed + (source << _SOURCE_KEY_BITS)
        epochs, packs = places // count, places % count
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            packs[chosen] = permute(packs[chosen], count=count, seed=seed, epoch=epoch)
        return packs

    def sequence(self, source: int, pack: int) -> SequenceMeta:
        """One pack of dataset number `source`, from the index alone."""
        dataset, plan = self.corpus.datasets[source], self.plans[source]
        samples, pieces = plan.pack(pack), plan.pack_pieces(pack)
        if pieces is None:
            image_ids, _ = dataset.image_ids(samples)
            trained = dataset.sample_index["trained_len"][samples]
        else:
            image_ids, _ = piece_images(dataset, samples, pieces)
            trained = piece_trained(dataset, samples, pieces)
        return SequenceMeta(
            sample_ids=tuple((samples + self.corpus.sample_offsets[source]).tolist()),
            num_tokens=int(plan.tokens[pack]),
            trained_tokens=int(trained.sum()),
            image_ids=tuple((image_ids + self.corpus.image_offsets[source]).tolist()),
            pieces=() if pieces is None else tuple((a, b) for a, b in pieces.tolist()),
        )

    def layout(self, row: SequenceMeta) -> SequenceLayout:
        """Where the segments and images of a sequence lie, without reading it: as `micro_batch`
        puts them."""
        number = self.corpus.dataset_of_sample(row.sample_ids[0])
        dataset = self.corpus.datasets[number]
        samples = np.array(row.sample_ids, dtype=np.int64) - self.corpus.sample_offsets[number]
        pieces = np.array(row.pieces, dtype=np.int64) if row.pieces else None
        positions, counts = image_positions(dataset, samples, pieces)
        tokens = dataset.sample_index["tok_len"][samples] if pieces is None else pieces[:, 1]
        width = self._tokens_per_image
        segments = align_up(tokens.astype(np.int64) + counts * (width - 1), self._align)
        starts = np.repeat(np.cumsum(segments) - segments, counts)
        before = np.arange(len(starts)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts += positions + before * (width - 1)
        if not self.packing:
            segments = np.array([self.seq_length])
        elif (used := int(segments.sum())) < self.seq_length:
            segments = np.append(segments, self.seq_length - used)
        return SequenceLayout(
            segments=tuple(segments.tolist()),
            image_ids=row.image_ids,
            image_starts=tuple(starts.tolist()),
        )

    def micro_batch(self, rows: tuple[SequenceMeta, ...]) -> MicroBatch:
        """Tensors of the given rows; reads their tokens and checks them.

        Raises:
            DataError: a stored sample is damaged, and `on_damage` is None or gives up.
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
            segments, slots = self._fill_row(number, row, *views)
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
        row: SequenceMeta,
        tokens_S: np.ndarray,
        labels_S: np.ndarray,
        weights_S: np.ndarray,
        positions_S: np.ndarray,
    ) -> tuple[np.ndarray, list[ImageSlot]]:
        """Write one row in place; returns segment lengths (padding included) and slots."""
        data, damaged = self.corpus.gather(row.sample_ids, row.pieces)
        for sample in damaged:
            if self._on_damage is None:
                raise DataError(sample.problem)
            self._on_damage(sample)
        width = self._tokens_per_image
        repeats = np.ones(len(data.tokens), dtype=np.int64)
        repeats[data.image_positions] = width
        tokens = np.repeat(data.tokens, repeats)
        trained = np.repeat(data.trained, repeats)
        lengths = data.tok_lens + data.image_counts * (width - 1)
        segments = align_up(lengths, self._align) if self._align > 1 else lengths
        used = int(segments.sum())
        if used > self.seq_length:
            raise DataError(
                f"samples {list(row.sample_ids)} of {self.corpus.path} take {used} positions, more "
                f"than the {self.seq_length} they were planned for: the index is damaged, run "
                "`python -m tools.preprocess verify`"
            )
        ends = np.cumsum(lengths)
        # The label of a position is the next token, except at a sample's end: what follows there
        # belongs to another sample.
        weighted = np.zeros(len(tokens), dtype=bool)
        weighted[:-1] = trained[1:]
        weighted[ends - 1] = False
        # How far each sample moves to the right for the padding inside of the segments before it.
        moves = np.cumsum(segments - lengths) - (segments - lengths)
        labels = np.append(np.where(weighted[:-1], tokens[1:], 0), 0)
        places = slice(0, len(tokens))
        if moves.any():
            places = np.arange(len(tokens)) + np.repeat(moves, lengths)
        tokens_S[places], labels_S[places], weights_S[places] = tokens, labels, weighted
        if used < self.seq_length:
            segments = np.append(segments, self.seq_length - used)
        positions_S[:] = np.arange(self.seq_length) - np.repeat(
            np.cumsum(segments) - segments, segments
        )
        starts = data.image_positions + np.arange(len(data.image_positions)) * (width - 1)
        starts += np.repeat(moves, data.image_counts)
        slots = [
            ImageSlot(image_id=image_id, row=number, start=start)
            for image_id, start in zip(data.image_ids.tolist(), starts.tolist(), strict=True)
        ]
        return segments, slots


def _log_plan(dataset: Dataset, plan: PackPlan) -> None:
    log.info(
        "%s: %d %s in %d sequences of %d, %.2f %% full, %d samples too long",
        dataset.path, len(plan.samples), "samples" if plan.pieces is None else "pieces",
        plan.num_packs, plan.params.seq_length, 100 * plan.fill, len(plan.dropped),
    )  # fmt: skip


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
    smallest. Where one cost is nearly the same for all items, it hides the other; if a bin then
    bears too much, items are dealt by how far they are from the mean. Deterministic; ties go to
    the lower number.

    Args:
        costs: float64 [items, 2]; the number of items is a multiple of `bins`.

    Returns:
        Item numbers of each bin, ascending within a bin.
    """
    share = costs / np.maximum(costs.sum(axis=0), 1.0)
    members = _deal_by_load(share, bins)
    if _MANY_BINS <= bins < len(costs) and _worst(costs, members) > _TOO_UNEVEN:
        members = min(members, _deal_by_distance(costs, bins), key=lambda m: _worst(costs, m))
    return [sorted(member) for member in members]


def _worst(costs: np.ndarray, members: list[list[int]]) -> float:
    """The most loaded bin over the mean bin, for the cost where that is largest."""
    loads = costs[np.array(members)].sum(axis=1)
    return float((loads.max(axis=0) / np.maximum(loads.mean(axis=0), 1e-9)).max())


def _deal_by_load(share: np.ndarray, bins: int) -> list[list[int]]:
    room = np.full(bins, len(share) // bins)
    loads = np.zeros((bins, 2))
    members: list[list[int]] = [[] for _ in range(bins)]
    for item in np.argsort(-share.max(axis=1), kind="stable").tolist():
        worst = (loads + share[item]).max(axis=1)
        chosen = int(np.argmin(np.where(room > 0, worst, np.inf)))
        loads[chosen] += share[item]
        room[chosen] -= 1
        members[chosen].append(item)
    return members


def _deal_by_distance(costs: np.ndarray, bins: int) -> list[list[int]]:
    """The item furthest from the mean first, to where the sums of distances come closest to 0."""
    away = costs / np.maximum(costs.mean(axis=0), 1e-9) - 1
    room = np.full(bins, len(costs) // bins)
    sums = np.zeros((bins, 2))
    members: list[list[int]] = [[] for _ in range(bins)]
    for item in np.argsort(-np.abs(away).max(axis=1), kind="stable").tolist():
        # Growth of the squared length of each bin's sum.
        growth = (sums @ away[item]) * 2
        chosen = int(np.argmin(np.where(room > 0, growth, np.inf)))
        sums[chosen] += away[item]
        room[chosen] -= 1
        members[chosen].append(item)
    return members
