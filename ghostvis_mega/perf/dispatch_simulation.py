"""How evenly pictures spread over 8 to thousands of ranks, and what they send each other, from
index arithmetic alone: no process group, no GPU, no picture is decoded.

Packs come from the planner that training uses, replicas get them as `BatchSource` deals them, and
owners are those that `dispatch_images` names.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.looks.balance import llm_cost, packs_of_step, tower_cost
from ghostvis_mega.data.looks.mix import ghostvis_mix, picture_sizes
from ghostvis_mega.data.order import shuffled
from ghostvis_mega.data.packing import Ragged
from ghostvis_mega.data.plan import (
    PlanParams,
    align_up,
    check_alignment,
    load_or_build,
    pack_lengths,
)
from ghostvis_mega.data.source import balance
from ghostvis_mega.parallel.dispatch import ImageDispatch, dispatch_images
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.volume import exchange_volume
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.figures import Figure, at_most, measured

MIX_SAMPLES = 200_000
PATCHES_PER_IMAGE = 576
"""Of a 336-pixel picture in patches of 14."""
PATCH_SIZE = 14
IMBALANCE, DISPATCH_S = 1.05, 1.0
"""Bars: patches of the busiest rank over the mean, and seconds a step."""
_SHUFFLE_KEY = 4
_MIB = 2**20


@dataclass(frozen=True)
class Packs:
    """What decides batches and dispatch: one entry a pack, in the order of the plan."""

    tokens: np.ndarray  # int64: useful positions
    sumsq: np.ndarray  # float64: sum of squared sample lengths
    seq_length: int
    images: Ragged  # distinct picture numbers of each pack
    patches: np.ndarray  # int64, by picture number

    @property
    def alike(self) -> bool:
        """Whether all pictures have the same number of patches."""
        return len(self.patches) == 0 or bool((self.patches == self.patches[0]).all())


@dataclass(frozen=True)
class Shape:
    """A world and its batch."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    packs_per_replica: int = 16
    global_size: int | None = None
    """Packs of a step, instead of `packs_per_replica`."""

    def replicas(self, ranks: int) -> int:
        """Data-parallel size of a world.

        Raises:
            ConfigError: The degrees do not divide the world, or the batch not the replicas.
        """
        size = self.tensor * self.pipeline * self.context
        if ranks % size:
            raise ConfigError(
                [f"{ranks} ranks cannot hold replicas of {size} (tensor x pipeline x context): "
                 f"give a multiple of {size} to --ranks"]
            )  # fmt: skip
        if self.global_size is not None and self.global_size % (ranks // size):
            raise ConfigError(
                [f"--global-size {self.global_size} is not a multiple of the {ranks // size} "
                 f"replicas that {ranks} ranks hold: change it, or leave {ranks} out of --ranks"]
            )  # fmt: skip
        return ranks // size

    def batch_size(self, ranks: int) -> int:
        """Packs of a step."""
        return self.global_size or self.packs_per_replica * self.replicas(ranks)

    def places(self, ranks: int) -> list[Place]:
        """Coordinates in rank order: tensor fastest, then context, data, pipeline."""
        return [
            Place(data=data, pipeline=pipeline, tensor=tensor, context=context)
            for pipeline in range(self.pipeline)
            for data in range(self.replicas(ranks))
            for context in range(self.context)
            for tensor in range(self.tensor)
        ]


def mix_packs(
    *, seq_length: int, tokens_per_image: int, segment_align: int, native: bool, seed: int
) -> Packs:
    """Packs of the synthetic GhostVis mix (`data.looks.mix`).

    Raises:
        DataError: `segment_align` does not divide `seq_length`.
    """
    check_alignment(seq_length, segment_align)
    lengths, images = ghostvis_mix(
        MIX_SAMPLES, seq_length=seq_length, tokens_per_image=tokens_per_image, seed=seed
    )
    params = PlanParams("balanced", seq_length, tokens_per_image, seed)
    aligned = align_up(lengths, segment_align)
    packs = pack_lengths(aligned, np.arange(len(lengths)), None, params)
    packs = packs.take(shuffled(len(packs), seed, _SHUFFLE_KEY))
    starts = packs.offsets[:-1]
    shown = images[packs.values] == 1
    # Each sample of the mix has a picture of its own, which takes the sample's number.
    counts = np.add.reduceat(shown.astype(np.int64), starts)
    sizes = picture_sizes(len(lengths), seed=seed) if native else None
    return Packs(
        tokens=np.add.reduceat(lengths[packs.values], starts),
        sumsq=np.add.reduceat(lengths[packs.values].astype(np.float64) ** 2, starts),
        seq_length=seq_length,
        images=Ragged(np.concatenate([[0], np.cumsum(counts)]), packs.values[shown]),
        patches=_patches(sizes, count=len(lengths)),
    )


def dataset_packs(
    dataset: Dataset,
    *,
    seq_length: int,
    tokens_per_image: int,
    segment_align: int,
    native: bool,
    seed: int,
) -> Packs:
    """Packs of a prepared dataset, from its plan.

    Raises:
        DataError: No sample fits into `seq_length`, or an index is damaged.
    """
    params = PlanParams("balanced", seq_length, tokens_per_image, seed, segment_align=segment_align)
    plan = load_or_build(dataset, params)
    ids, counts = dataset.image_ids(plan.samples.astype(np.int64))
    pack_of_sample = np.repeat(np.arange(plan.num_packs), plan.segments)
    width = max(1, dataset.num_images)
    pairs = np.unique(np.repeat(pack_of_sample, counts) * width + ids)
    distinct = np.bincount(pairs // width, minlength=plan.num_packs)
    index = dataset.image_index
    sizes = np.stack([index["width"], index["height"]], axis=1) if native else None
    return Packs(
        tokens=plan.tokens.astype(np.int64),
        sumsq=plan.sumsq.astype(np.float64),
        seq_length=seq_length,
        images=Ragged(np.concatenate([[0], np.cumsum(distinct)]), pairs % width),
        patches=_patches(sizes, count=dataset.num_images),
    )


def _patches(sizes: np.ndarray | None, *, count: int) -> np.ndarray:
    """Patches of each picture: of its own resolution, or of the tower's."""
    if sizes is None:
        return np.full(count, PATCHES_PER_IMAGE, dtype=np.int64)
    return (-(-sizes.astype(np.int64) // PATCH_SIZE)).prod(axis=1)


@dataclass(frozen=True)
class StepFigures:
    """One simulated step."""

    images: int
    patches: float
    """Patches of the busiest rank over the mean."""
    least: float
    """The same ratio that no dispatch could undercut."""
    cost: float
    """Tower and language model together: the busiest rank over the mean."""
    sent: np.ndarray  # float64 [ranks]: bytes
    local_share: float
    assign_s: float
    dispatch_s: float


def simulate_step(
    packs: Packs, shape: Shape, *, ranks: int, step: int, bytes_per_image: int, seed: int
) -> StepFigures:
    """Batch, dispatch and exchange of one step; times are CPU seconds."""
    places, size = shape.places(ranks), shape.batch_size(ranks)
    chosen = packs_of_step(step, size=size, count=len(packs.tokens), seed=seed)
    weights = np.stack([packs.tokens, packs.images.counts], axis=1).astype(np.float64)[chosen]
    began_s = time.process_time()
    members = balance(weights, bins=shape.replicas(ranks))
    for replica in members:
        balance(weights[replica], bins=len(replica))
    assigned_s = time.process_time()
    shown = packs.images.take(chosen).lists()
    wanted = [[image for pack in replica for image in shown[pack]] for replica in members]
    patches = None
    if not packs.alike:
        distinct = np.unique(packs.images.take(chosen).values)
        patches = dict(zip(distinct.tolist(), packs.patches[distinct].tolist(), strict=True))
    dispatch = dispatch_images(wanted, places, patches=patches)
    ended_s = time.process_time()
    volume = exchange_volume(
        dispatch, places, bytes_per_image=bytes_per_image, context=shape.context
    )
    return StepFigures(
        images=dispatch.num_images,
        patches=dispatch.imbalance(),
        least=_least(dispatch),
        cost=_cost_ratio(packs, dispatch, [chosen[replica] for replica in members], places),
        sent=volume.sent,
        local_share=volume.local_share,
        assign_s=assigned_s - began_s,
        dispatch_s=ended_s - assigned_s,
    )


def _least(dispatch: ImageDispatch) -> float:
    """A picture cannot be cut: the largest one, or equal ones that do not divide, set a floor."""
    ranks, loads = len(dispatch.encode), dispatch.loads
    if not any(loads):
        return 0.0
    if dispatch.patches is None:
        return -(-dispatch.num_images // ranks) * ranks / dispatch.num_images
    return max(1.0, max(dispatch.patches.values()) * ranks / sum(loads))


def _cost_ratio(
    packs: Packs, dispatch: ImageDispatch, members: Sequence[np.ndarray], places: Sequence[Place]
) -> float:
    """Ranks of a replica are taken to share its language model equally."""
    tower = np.array(
        [float(np.sum(tower_cost(packs.patches[list(own)]))) for own in dispatch.encode]
    )
    llm = llm_cost(np.full(len(packs.tokens), float(packs.seq_length)), packs.sumsq)
    per_rank = np.array([llm[chosen].sum() for chosen in members]) * len(members) / len(places)
    loads = tower + per_rank[[place.data for place in places]]
    return float(loads.max() / loads.mean())


def simulate(
    packs: Packs,
    shape: Shape,
    *,
    worlds: Sequence[int],
    steps: int,
    bytes_per_image: int,
    seed: int,
) -> list[Figure]:
    """Rows of name, value, unit, bar and ok for each world size.

    Raises:
        ConfigError: A world or batch does not divide.
    """
    for ranks in worlds:
        shape.replicas(ranks)
    rows = []
    for ranks in worlds:
        done = [
            simulate_step(
                packs, shape, ranks=ranks, step=step, bytes_per_image=bytes_per_image, seed=seed
            )
            for step in range(steps)
        ]
        batch = [("replicas", shape.replicas(ranks)), ("packs a step", shape.batch_size(ranks))]
        rows += [measured(f"{ranks} ranks: {name}", value) for name, value in batch]
        rows += _rows(f"{ranks} ranks", done)
    return rows


def _rows(where: str, done: Sequence[StepFigures]) -> list[Figure]:
    def column(name: str) -> np.ndarray:
        return np.array([getattr(figures, name) for figures in done])

    sent = np.stack([figures.sent for figures in done]) / _MIB
    found = [
        ("images a step", round(column("images").mean()), "", None),
        ("patches, busiest rank over mean", column("patches").mean(), "", IMBALANCE),
        ("same, worst step", column("patches").max(), "", IMBALANCE),
        ("same, least possible", column("least").mean(), "", None),
        ("tower and LLM, busiest rank over mean", column("cost").mean(), "", None),
        ("bytes sent, mean rank", sent.mean(), "MiB", None),
        ("bytes sent, busiest rank", sent.max(), "MiB", None),
        ("bytes that stay on their rank", 100 * column("local_share").mean(), "%", None),
        ("assigning packs, CPU time a step", column("assign_s").mean(), "s", None),
        ("dispatch, CPU time a step", column("dispatch_s").mean(), "s", DISPATCH_S),
    ]
    # Judged before they are rounded.
    figures = [at_most(f"{where}: {name}", value, unit, bar) for name, value, unit, bar in found]
    for figure in figures:
        if not isinstance(figure["value"], int):
            figure["value"] = round(float(figure["value"]), 5)
    return figures
