"""Pack plans: which samples form which sequence, as indices only.

A plan is a function of (dataset, parameters). It can be stored under `plans/` of the dataset; a
plan made in memory is the same, byte for byte.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.manifest import PLANS_DIRECTORY
from ghostvis_mega.data.order import shuffled
from ghostvis_mega.data.packing import Ragged, make_units, pack_balanced, pack_bfd
from ghostvis_mega.data.pieces import concat, cut_long, piece_images, piece_lengths, whole
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import atomic_write, atomic_write_json, canonical_json

log = logging.getLogger(__name__)

Algorithm = Literal["balanced", "bfd", "concat", "none"]
ALGORITHMS: tuple[Algorithm, ...] = ("balanced", "bfd", "concat", "none")
TooLong = Literal["drop", "truncate-at-turn", "split-text"]
PLANNER_VERSION = 2
"""Part of a plan's identity: raise it when the same parameters give another plan."""

PLAN_FILE = "plan.json"
FORMAT_PIECES = 2
"""Format of a stored plan that cuts samples; without it, a plan has the first format."""
_SHUFFLE_KEY = 2
_LATER: dict[str, Any] = {"segment_align": 1, "too_long": "drop"}
"""Parameters that the first plans did not have, and what those plans mean."""

_ARRAYS: dict[str, np.dtype] = {
    "pack_off.i64": np.dtype("<i8"),
    "pack_samples.u32": np.dtype("<u4"),
    "dropped.u32": np.dtype("<u4"),
    "tokens.u32": np.dtype("<u4"),
    "segments.u32": np.dtype("<u4"),
    "images.u32": np.dtype("<u4"),
    "distinct_images.u32": np.dtype("<u4"),
    "sumsq.u64": np.dtype("<u8"),
}
_PIECES = "pieces.u32"


@dataclass(frozen=True)
class PlanParams:
    """What decides a plan, beside the dataset.

    Args:
        tokens_per_image: positions that replace one <|image|>.
        group_images: samples of one picture go to one pack where that costs nothing (`balanced`).
        images_per_pack: with `group_images`, one picture takes at most 1/images_per_pack of a pack,
            so that a pack is not about a single picture.
        segment_align: each sample of a pack takes a multiple of so many positions, the rest of
            which is padding of its own segment; 2 * CP for context parallelism.
        too_long: what becomes of samples longer than a sequence, except with `concat`, which cuts
            all samples where sequences end; see `pieces.cut_long`.
    """

    algorithm: Algorithm
    seq_length: int
    tokens_per_image: int
    seed: int
    group_images: bool = True
    images_per_pack: int = 4
    segment_align: int = 1
    too_long: TooLong = "drop"

    def document(self) -> dict[str, Any]:
        """JSON of the parameters; later ones only where they are set, so that plans made before
        they existed keep their names and bytes."""
        values = asdict(self)
        return {k: v for k, v in values.items() if k not in _LATER or v != _LATER[k]}

    def digest(self, dataset: Dataset) -> str:
        """Name of the plan: 16 hex digits of parameters, dataset and planner."""
        identity = {
            **self.document(),
            "dataset": dataset.manifest.digest,
            "planner": PLANNER_VERSION,
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()[:16]


@dataclass(frozen=True)
class PackPlan:
    """Packs as two arrays, and the cost of each pack."""

    params: PlanParams
    offsets: np.ndarray  # int64 [packs + 1] into samples
    samples: np.ndarray  # uint32 [planned samples]
    dropped: np.ndarray  # uint32: samples longer than seq_length
    tokens: np.ndarray  # uint32 [packs]: useful positions, images expanded
    segments: np.ndarray  # uint32 [packs]: samples
    images: np.ndarray  # uint32 [packs]: image places
    distinct_images: np.ndarray  # uint32 [packs]: what a tower must encode
    sumsq: np.ndarray  # uint64 [packs]: sum of squared segment lengths, the cost of attention
    pieces: np.ndarray | None = None
    """uint32 [planned samples, 2]: first stored token and number of tokens of the part of a sample
    that the pack holds; None if all are whole."""

    @property
    def num_packs(self) -> int:
        """Sequences of one epoch."""
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """Share of all positions that are useful."""
        return float(self.tokens.sum()) / max(1, self.num_packs * self.params.seq_length)

    def pack(self, number: int) -> np.ndarray:
        """Sample numbers of one pack, in order: int64."""
        return self.samples[self.offsets[number] : self.offsets[number + 1]].astype(np.int64)

    def pack_pieces(self, number: int) -> np.ndarray | None:
        """Which tokens of the samples of `pack(number)` it holds: int64 [samples, 2] or None."""
        if self.pieces is None:
            return None
        return self.pieces[self.offsets[number] : self.offsets[number + 1]].astype(np.int64)


def align_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Lengths rounded up to a multiple."""
    return -(-lengths // multiple) * multiple


def check_alignment(seq_length: int, segment_align: int) -> None:
    """DataError unless a sequence holds a whole number of multiples: its tail is aligned too."""
    if segment_align < 1 or seq_length % segment_align:
        fitting = max(segment_align, seq_length - seq_length % max(1, segment_align))
        raise DataError(
            f"seq_length={seq_length} is not a multiple of segment_align={segment_align} "
            f"(2 * parallel.context where that is above 1): use {fitting} or another multiple"
        )


def _group_by_image(dataset: Dataset) -> np.ndarray:
    """int64 [samples], equal where the first image is; without images, a number of its own."""
    records = dataset.sample_index
    groups = dataset.num_images + np.arange(len(records), dtype=np.int64)
    has_image = np.flatnonzero(records["n_images"])
    image_ids, counts = dataset.image_ids(has_image)
    groups[has_image] = image_ids[np.cumsum(counts) - counts]
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def _make_packs(
    dataset: Dataset,
    params: PlanParams,
    lengths: np.ndarray,
    kept: np.ndarray,
    owners: np.ndarray,
) -> Ragged:
    """Packs of what has `lengths`; `owners` are the samples that it is, or is part of."""
    groups = None
    if params.group_images and params.algorithm == "balanced":
        groups = _group_by_image(dataset)[owners]
    return pack_lengths(lengths, kept, groups, params)


def pack_lengths(
    lengths: np.ndarray, kept: np.ndarray, groups: np.ndarray | None, params: PlanParams
) -> Ragged:
    """Packs of the samples `kept`, unshuffled: what a plan is beside the dataset's files.

    Args:
        lengths: int64 [samples], before alignment.
        kept: int64: those that fit.
        groups: int64 [samples]; equal numbers share a picture; None packs every sample alone.
    """
    capacity, seed = params.seq_length, params.seed
    if params.algorithm == "none":
        return Ragged.singles(kept)
    lengths = align_up(lengths, params.segment_align) if params.segment_align > 1 else lengths
    if params.algorithm == "bfd":
        return pack_bfd(lengths, kept, capacity=capacity, seed=seed)
    units = Ragged.singles(kept)
    if groups is not None:
        limit = max(1, capacity // params.images_per_pack)
        units = make_units(lengths[kept], groups[kept], limit=limit, seed=seed)
        units = Ragged(units.offsets, kept[units.values])
    return pack_balanced(lengths, units, capacity=capacity, seed=seed)


def build_plan(dataset: Dataset, params: PlanParams) -> PackPlan:
    """Pack a dataset.

    Raises:
        DataError: no sample fits into `seq_length`, there are images and no place for them, or
            `seq_length` is not a multiple of `segment_align`.
    """
    check_alignment(params.seq_length, params.segment_align)
    if params.tokens_per_image < 1 and dataset.num_images:
        raise DataError(
            f"{dataset.path} holds images, but an image takes {params.tokens_per_image} positions: "
            "use a model with a vision part, or a dataset of text"
        )
    if params.algorithm == "concat":
        return _concatenate(dataset, params)
    lengths = dataset.lengths(tokens_per_image=params.tokens_per_image)
    fits = lengths <= params.seq_length
    kept, dropped = np.flatnonzero(fits), np.flatnonzero(~fits)
    cut, parts = np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
    if params.too_long != "drop":
        cut, parts = cut_long(
            dataset,
            dropped,
            policy=params.too_long,
            seq_length=params.seq_length,
            tokens_per_image=params.tokens_per_image,
        )
        dropped = np.setdiff1d(dropped, cut)
    if not len(kept) and not len(cut):
        shortest = int(lengths.min()) if len(lengths) else 0
        raise DataError(
            f"no sample of {dataset.path} fits into seq_length={params.seq_length}: "
            f"the shortest of {len(lengths)} needs {shortest} positions"
        )
    if len(dropped):
        log.warning(
            "%s: %d of %d samples are longer than seq_length=%d and are left out",
            dataset.path, len(dropped), len(lengths), params.seq_length,
        )  # fmt: skip
    # Parts of samples are packed as if they were samples with numbers behind the others.
    owners = np.concatenate([np.arange(len(lengths)), cut])
    kept = np.concatenate([kept, len(lengths) + np.arange(len(cut))])
    sizes = {"tokens_per_image": params.tokens_per_image}
    lengths = np.concatenate([lengths, piece_lengths(dataset, cut, parts, **sizes)])
    packs = _make_packs(dataset, params, lengths, kept, owners)
    packs = packs.take(shuffled(len(packs), params.seed, _SHUFFLE_KEY))
    pieces = None
    if len(cut):
        pieces = np.concatenate([whole(dataset, np.arange(dataset.num_samples)), parts])
        pieces = pieces[packs.values]
    return _describe(
        dataset,
        params,
        packs=Ragged(packs.offsets, owners[packs.values]),
        pieces=pieces,
        dropped=dropped,
        planned=lengths[packs.values],
    )


def _concatenate(dataset: Dataset, params: PlanParams) -> PackPlan:
    """All samples end to end; only pictures leave something over."""
    offsets, samples, pieces = concat(
        dataset,
        seq_length=params.seq_length,
        tokens_per_image=params.tokens_per_image,
        segment_align=params.segment_align,
        seed=params.seed,
    )
    packs = Ragged(offsets, np.arange(len(samples)))
    packs = packs.take(shuffled(len(packs), params.seed, _SHUFFLE_KEY))
    samples, pieces = samples[packs.values], pieces[packs.values]
    sizes = {"tokens_per_image": params.tokens_per_image}
    return _describe(
        dataset,
        params,
        packs=Ragged(packs.offsets, samples),
        pieces=pieces,
        dropped=np.zeros(0, dtype=np.int64),
        planned=piece_lengths(dataset, samples, pieces, **sizes),
    )


def _describe(
    dataset: Dataset,
    params: PlanParams,
    *,
    packs: Ragged,
    pieces: np.ndarray | None,
    dropped: np.ndarray,
    planned: np.ndarray,
) -> PackPlan:
    """Costs of each pack from its samples, which take `planned` positions each."""
    offsets, samples, segments = packs.offsets, packs.values, packs.counts
    # A row without packing is one segment, whose padding is the row's.
    segment = align_up(planned, params.segment_align if params.algorithm != "none" else 1)
    image_ids, counts = (
        dataset.image_ids(samples) if pieces is None else piece_images(dataset, samples, pieces)
    )
    pack_of_image = np.repeat(np.repeat(np.arange(len(segments)), segments), counts)
    pairs = np.unique(pack_of_image * max(1, dataset.num_images) + image_ids)
    distinct = np.bincount(pairs // max(1, dataset.num_images), minlength=len(segments))
    return PackPlan(
        params=params,
        offsets=offsets.astype("<i8"),
        samples=samples.astype("<u4"),
        dropped=dropped.astype("<u4"),
        tokens=np.add.reduceat(planned, offsets[:-1]).astype("<u4"),
        segments=segments.astype("<u4"),
        images=np.bincount(pack_of_image, minlength=len(segments)).astype("<u4"),
        distinct_images=distinct.astype("<u4"),
        sumsq=np.add.reduceat(segment**2, offsets[:-1]).astype("<u8"),
        pieces=None if pieces is None else pieces.astype("<u4"),
    )


def _arrays(plan: PackPlan) -> dict[str, np.ndarray]:
    fields = (
        plan.offsets, plan.samples, plan.dropped, plan.tokens,
        plan.segments, plan.images, plan.distinct_images, plan.sumsq,
    )  # fmt: skip
    arrays = dict(zip(_ARRAYS, fields, strict=True))
    return arrays if plan.pieces is None else {**arrays, _PIECES: plan.pieces}


def save_plan(dataset: Dataset, plan: PackPlan) -> Path:
    """Store a plan inside its dataset, `plan.json` last; returns the plan's directory."""
    directory = dataset.path / PLANS_DIRECTORY / plan.params.digest(dataset)
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, array in _arrays(plan).items():
        data = array.tobytes()
        atomic_write(directory / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document = {
        "params": plan.params.document(),
        "planner": PLANNER_VERSION,
        "dataset": dataset.manifest.digest,
        "packs": plan.num_packs,
        "fill": round(plan.fill, 6),
        "files": files,
    }
    if plan.pieces is not None:
        document["format"] = FORMAT_PIECES
    document["digest"] = hashlib.sha256(canonical_json(document)).hexdigest()
    atomic_write_json(directory / PLAN_FILE, document)
    return directory


def read_plan(directory: Path, params: PlanParams | None = None) -> PackPlan:
    """Read a stored plan and check every byte of it.

    Raises:
        DataError: a file is missing or damaged.
    """
    file = directory / PLAN_FILE
    advice = f"delete {directory}, it is made again when needed"
    try:
        raw = file.read_bytes()
        document = json.loads(raw)
        digest = document.pop("digest")
        stored = PlanParams(**document["params"])
        intact = digest == hashlib.sha256(canonical_json(document)).hexdigest()
        intact = intact and raw == canonical_json({**document, "digest": digest})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is missing or damaged ({error}): {advice}") from error
    if not intact or (params is not None and stored != params):
        raise DataError(f"{file} does not match its digest or its directory's name: {advice}")
    if document.get("format", 1) > FORMAT_PIECES:
        raise DataError(
            f"{file} has format {document['format']}, made by a later version: {advice}"
        )
    arrays = []
    cuts = {_PIECES: np.dtype("<u4")} if _PIECES in document["files"] else {}
    for name, dtype in {**_ARRAYS, **cuts}.items():
        path = directory / name
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != document["files"][name]["sha256"]:
            raise DataError(f"{path} is missing or damaged: {advice}")
        arrays.append(np.frombuffer(data, dtype=dtype))
    if cuts:
        arrays[-1] = arrays[-1].reshape(-1, 2)
    return PackPlan(stored, *arrays)


def load_or_build(dataset: Dataset, params: PlanParams) -> PackPlan:
    """The stored plan with these parameters, else a fresh one in memory (nothing is written)."""
    directory = dataset.path / PLANS_DIRECTORY / params.digest(dataset)
    if (directory / PLAN_FILE).is_file():
        return read_plan(directory, params)
    return build_plan(dataset, params)
