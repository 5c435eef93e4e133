"""Weights of a running engine as Hugging Face tensors, gathered to the first rank bucket by bucket.

The order and the bytes are those of an export of the checkpoint that the same engine would save.
"""

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint.held import Held, held_parameters, saves_weight, weight_span
from ghostvis_mega.checkpoint.layout import layout_of
from ghostvis_mega.checkpoint.together import on_every_rank, on_first_rank
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.block_reader import Piece
from ghostvis_mega.convert.exporter import (
    ExportOptions,
    ExportPlan,
    about_training,
    finish_export,
    plan_export,
    tensor_pieces,
    write_settings,
)
from ghostvis_mega.convert.mapping import Entry, Parts, entries
from ghostvis_mega.convert.output import EXPORT_FILE, new_directory, write_ordered
from ghostvis_mega.convert.table import LAYOUTS
from ghostvis_mega.convert.tensor_file import CODES, DTYPES, TensorInfo, as_bytes
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.shards import partition_dim, unshard
from ghostvis_mega.utils.errors import CheckpointError, DataError

log = logging.getLogger(__name__)

BUCKET_BYTES = 512 << 20
"""What the first rank holds of the model at a time."""


@dataclass(frozen=True)
class _Piece:
    """Elements that one rank brings."""

    rank: int
    tensor_rank: int
    start: int
    length: int


@dataclass(frozen=True)
class Gathered:
    """One parameter of ours, whole, on the first rank."""

    entry: Entry
    tensor: torch.Tensor
    """On the CPU, in the parameter's own type."""


class Gatherer:
    """Knows which rank brings what; making it and iterating are collective.

    Args:
        engine: Between two steps.
        bucket_bytes: Most that is gathered at a time (more, where one parameter alone is larger).

    Raises:
        CheckpointError: The ranks do not hold the whole model.
    """

    def __init__(self, engine: TrainEngine, *, bucket_bytes: int = BUCKET_BYTES):
        self.engine = engine
        self._rank = engine.groups.rank
        self._own: dict[str, tuple[Held, torch.Tensor]] = {}
        self.entries = entries(Parts.of(engine.run.model), LAYOUTS["ghostvis"])
        self.infos: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        for found in on_every_rank(self._describe):
            for name, dtype, piece in found:
                self._pieces[name].append(piece)
                self._code(name, dtype)
        self._check()
        self.buckets = self._cut(bucket_bytes)

    def _describe(self) -> list[tuple[str, str, _Piece]]:
        found = []
        for held in held_parameters(self.engine):
            span = weight_span(held)
            if span is None or not saves_weight(held):
                continue
            weight = span.tensors["weight"]
            self._own[held.name] = (held, weight)
            piece = _Piece(self._rank, held.tensor_rank, span.start, span.length)
            found.append((held.name, CODES[weight.dtype], piece))
        return found

    def _code(self, name: str, dtype: str) -> None:
        shapes = {entry.native: entry.shape for entry in self.entries}
        if name not in shapes:
            raise CheckpointError(f"the model has {name}, which has no name in any format")
        self.infos[name] = TensorInfo(dtype, shapes[name])

    def _check(self) -> None:
        for entry in self.entries:
            held = sum(piece.length for piece in self._pieces.get(entry.native, []))
            if held != prod(entry.shape):
                raise CheckpointError(
                    f"the ranks hold {held} elements of {entry.native}, whose shape is "
                    f"{list(entry.shape)}"
                )

    def _cut(self, bucket_bytes: int) -> list[list[Entry]]:
        buckets: list[list[Entry]] = []
        size = 0
        for entry in self.entries:
            num_bytes = self.infos[entry.native].num_bytes
            if not buckets or size + num_bytes > bucket_bytes:
                buckets.append([])
                size = 0
            buckets[-1].append(entry)
            size += num_bytes
        return buckets

    def __iter__(self) -> Iterator[Gathered]:
        """Every parameter on the first rank, in the order of exported files; nothing on others."""
        for bucket in self.buckets:
            brought = self._bring(bucket)
            for entry in bucket if self._rank == 0 else ():
                yield Gathered(entry, self._whole(entry, brought))
            del brought

    def _bring(self, bucket: Sequence[Entry]) -> dict[tuple[str, _Piece], torch.Tensor]:
        """The bucket's pieces on the first rank; one message from each rank that has some."""
        by_rank: dict[int, list[tuple[str, _Piece]]] = defaultdict(list)
        for entry in bucket:
            for piece in self._pieces[entry.native]:
                by_rank[piece.rank].append((entry.native, piece))
        brought: dict[tuple[str, _Piece], torch.Tensor] = {}
        for rank, wanted in sorted(by_rank.items()):
            if rank == 0:
                if self._rank == 0:
                    for name, piece in wanted:
                        brought[name, piece] = self._own[name][1].detach().reshape(-1).cpu()
            elif self._rank == rank:
                parts = [
                    self._own[name][1].detach().contiguous().view(-1).view(torch.uint8)
                    for name, _ in wanted
                ]
                dist.send(torch.cat(parts), dst=0)
            elif self._rank == 0:
                sizes = [p.length * self.infos[name].item_bytes for name, p in wanted]
                message = torch.empty(sum(sizes), dtype=torch.uint8, device=self.engine.device)
                dist.recv(message, src=rank)
                for (name, piece), data in zip(wanted, message.cpu().split(sizes), strict=True):
                    # A piece may begin anywhere in the message, its elements may not.
                    brought[name, piece] = data.clone().view(DTYPES[self.infos[name].dtype])
        return brought

    def _whole(self, entry: Entry, brought: dict[tuple[str, _Piece], torch.Tensor]) -> torch.Tensor:
        pieces = self._pieces[entry.native]
        count = 1 + max(piece.tensor_rank for piece in pieces)
        numel = prod(entry.shape)
        dtype = DTYPES[self.infos[entry.native].dtype]
        flats = [torch.empty(numel // count, dtype=dtype) for _ in range(count)]
        for piece in pieces:
            part = flats[piece.tensor_rank]
            part[piece.start : piece.start + piece.length] = brought[entry.native, piece]
        if count == 1:
            return flats[0].view(entry.shape)
        gated = self.engine.run.model.llm.activation == "swiglu"
        parts = [flat.view(_part_shape(entry, count)) for flat in flats]
        return unshard(parts, entry.native, gated=gated)


def _part_shape(entry: Entry, count: int) -> list[int]:
    shape = list(entry.shape)
    dim = partition_dim(entry.native)
    assert dim is not None, f"{entry.native} is in {count} parts, but is not cut"
    shape[dim] //= count
    return shape


def iter_hf_tensors(
    engine: TrainEngine, plan: ExportPlan | None, *, gatherer: Gatherer
) -> Iterator[tuple[str, Iterator[Piece]]]:
    """Names and bytes of all tensors of a plan, in its order; collective.

    Args:
        engine: Between two steps.
        plan: What to export; only the first rank needs it and only there something comes.
        gatherer: Of this engine.

    Yields:
        A name and its bytes in pieces, which are to be used before the next is asked for.
    """
    for gathered in gatherer:
        assert plan is not None
        flat = gathered.tensor.view(-1)

        def native_pieces(
            name: str, start: int, length: int, flat: torch.Tensor = flat
        ) -> Iterator[Piece]:
            yield as_bytes(flat[start : start + length])

        pieces = tensor_pieces(plan, native_pieces)
        for name in plan.names_of(gathered.entry.native):
            yield name, pieces(name)


def export_online(
    engine: TrainEngine,
    out: Path,
    options: ExportOptions,
    *,
    step: int,
    sequences: int,
    bucket_bytes: int = BUCKET_BYTES,
) -> Path:
    """Write a Hugging Face directory of the weights as they are; collective.

    Args:
        engine: Between two steps.
        out: On the first rank's file system.
        options: As for a checkpoint; the first rank's count.
        step: Optimizer steps done, for the model card.
        sequences: Sequences consumed by them.
        bucket_bytes: Most that the first rank gathers at a time.

    Raises:
        CheckpointError: It cannot be written; raised on all ranks.
    """
    gatherer = Gatherer(engine, bucket_bytes=bucket_bytes)
    plans: list[ExportPlan] = []

    def plan() -> None:
        parts = Parts.of(engine.run.model)
        with _told():
            plans.append(plan_export(parts, gatherer.infos, options))

    on_first_rank(plan)
    tensors = iter_hf_tensors(engine, plans[0] if plans else None, gatherer=gatherer)
    failures: list[OSError | CheckpointError] = []
    if engine.groups.rank == 0:
        about = about_training(layout_of(engine), step=step, sequences=sequences, imported=None)
        try:
            with _told():
                _write(plans[0], tensors, out, options, about)
        except (OSError, CheckpointError) as error:
            failures.append(error)
    # Also after a failure: the other ranks wait until their weights have been fetched.
    for _ in tensors:
        pass

    def outcome() -> None:
        if failures:
            raise CheckpointError(f"the export to {out} failed: {failures[0]}") from failures[0]

    on_first_rank(outcome)
    return out


@contextmanager
def _told() -> Iterator[None]:
    """Problems of data become those of a checkpoint, which all ranks are told of."""
    try:
        yield
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _write(
    plan: ExportPlan,
    tensors: Iterator[tuple[str, Iterator[Piece]]],
    out: Path,
    options: ExportOptions,
    about: dict[str, Any],
) -> None:
    with new_directory(out, force=options.force) as folder:
        shards = plan.shards(options.shard_bytes)
        written = write_ordered(folder, shards, tensors)
        finish_export(folder, plan, shards, written, about)
    log.info("exported %d tensors as %s into %s", len(plan.infos), plan.form, out)


@dataclass(frozen=True)
class Exporter:
    """Exports of a run beside its checkpoints, in `OUTPUT/hf`; methods are collective.

    Args:
        run: With `checkpoint.export_hf` of `end` or `saves`.

    Raises:
        CheckpointError: The model fits no format, or the tokenizer of `data.train` has no equal
            form, or transformers would not read it as such: known before the first step, not after
            the last, for all but the weights is written once to be thrown away.
    """

    run: RunConfig

    def __post_init__(self) -> None:
        def check() -> None:
            parts = Parts.of(self.run.model)
            infos = {
                entry.native: TensorInfo("F32", entry.shape)
                for entry in entries(parts, LAYOUTS["ghostvis"])
            }
            with _told(), TemporaryDirectory(prefix="ghostvis-export-") as folder:
                write_settings(Path(folder), plan_export(parts, infos, self.options))

        on_first_rank(check)

    @property
    def options(self) -> ExportOptions:
        """As `ghostvis convert export --data` has them."""
        return ExportOptions(assets=Assets(data=self.run.data.train), force=True)

    def save(self, engine: TrainEngine, *, step: int) -> Path | None:
        """Export if it is due after `step` steps, and delete old exports."""
        settings = self.run.checkpoint
        if settings.export_hf == "end" and step < self.run.train.steps:
            return None
        folder = self.run.log.output / "hf"
        sequences = step * self.run.batch.global_size
        out = folder / f"step-{step:08d}"
        export_online(engine, out, self.options, step=step, sequences=sequences)

        def prune() -> None:
            complete = sorted(p for p in folder.glob("step-*") if (p / EXPORT_FILE).is_file())
            # After a step back the newest one may have the lower number.
            others = sorted((p for p in complete if p != out), key=lambda p: p.stat().st_mtime)
            for old in others[: max(0, len(complete) - settings.keep)]:
                shutil.rmtree(old)

        on_first_rank(prune)
        return out
