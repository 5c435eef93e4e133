"""A small training problem that all layouts solve: settings, rows with pictures, pictures."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import ImageSlot, MicroBatch, SequenceLayout
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.model.inputs import segment_lengths
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.image_rows import ImageRows, image_rows
from ghostvis_mega.parallel.windows import PictureWindow, cut_windows
from ghostvis_mega.perf.certify.layout import Layout, Settings, merge

IMAGE_TOKEN = 5
LENGTH = 32
ROWS = 8
STEPS = 3

MODEL: Settings = {
    "llm": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_hidden_size": 96,
        "vocab_size": 128,
        "max_positions": 64,
        "rope_base": 10000.0,
        "init_std": 0.08,
    },
    "vision": {
        "kind": "siglip",
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "ffn_hidden_size": 48,
        "image_size": 16,
        "patch_size": 4,
        "init_std": 0.15,
    },
    "connector": {"kind": "avgpool_mlp", "tokens_per_image": 4, "init_std": 0.15, "num_heads": 4},
}

SHOWN = {
    # In rows 2 and 3 the same picture (one replica), in rows 0 and 4 another (two replicas), in
    # row 7 one twice.
    "mixed": [(0,), (), (1, 2), (1,), (3, 4, 0), (), (5,), (5, 6, 5)],
    "text": [()] * ROWS,
    "one": [(0,) if row == 2 else () for row in range(ROWS)],
}
"""Pictures of each row: no, one and several; none at all; one in the whole batch."""


class Stream(Protocol):
    """The batches of a problem, whole for the reference and cut for a rank of a layout."""

    @property
    def key(self) -> str:
        """Equal for equal batches."""

    def rows(
        self, run: RunConfig, groups: Groups, step: int
    ) -> tuple[list[MicroBatch], dict[int, torch.Tensor]]:
        """The whole global batch as single rows, and its pictures by id."""

    def step_input(self, run: RunConfig, groups: Groups, step: int) -> StepInput:
        """This rank's part of the same batch."""


@dataclass(frozen=True)
class SyntheticStream:
    """Random rows and pictures, of no dataset.

    Args:
        kind: Key of `SHOWN`.
        align: See `Layout.align`.
    """

    kind: str = "mixed"
    align: int = 1

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.align}"

    def rows(
        self, run: RunConfig, groups: Groups, step: int
    ) -> tuple[list[MicroBatch], dict[int, torch.Tensor]]:
        return make_rows(run, kind=self.kind, align=self.align, step=step)

    def step_input(self, run: RunConfig, groups: Groups, step: int) -> StepInput:
        rows, pictures = self.rows(run, groups, step)
        return step_input(run, groups, rows, pictures, step=step)


def run_of(layout: Layout, folder: Path) -> RunConfig:
    """Settings of a layout; `folder` takes its DeepSpeed files."""
    return make_run(
        folder,
        stage=layout.stage,
        overlap=layout.overlap,
        vision_stage=layout.vision_stage,
        offload=layout.offload,
        **merge(layout.problem, layout.split),
    )


def make_run(
    folder: Path,
    *,
    stage: int = 1,
    overlap: bool = False,
    vision_stage: int | None = None,
    offload: Collection[str] = (),
    **sections: Any,
) -> RunConfig:
    """Settings of one run.

    Args:
        folder: Takes the DeepSpeed files.
        stage: ZeRO stage of both engines; the vision engine stays at 2 where the LLM has 3.
        overlap: DeepSpeed's `overlap_comm`.
        vision_stage: Of the vision engine, where it has a file of its own.
        offload: Engines whose optimizer is on the host.
        sections: Keys of the settings' sections that differ from the base.
    """
    stages = {"llm": stage, "vision": min(stage, 2) if vision_stage is None else vision_stage}
    files = {
        engine: _deepspeed_file(folder, own, overlap, offload=engine in offload)
        for engine, own in stages.items()
    }
    frozen = sections.get("train", {}).get("freeze", ())
    if files["vision"] == files["llm"] or "projector" in frozen:
        del files["vision"]
    base = {
        "model": MODEL,
        "data": {"train": "unused", "seq_length": LENGTH},
        "batch": {"global_size": ROWS, "micro_size": 1},
        "deepspeed": files,
        "train": {"steps": STEPS, "seed": 3},
        "optim": {
            "lr": {"llm": 1e-3, "vision": 5e-4, "resampler": 8e-4, "projector": 2e-3},
            "clip_norm": 0.5,
            # Adam's default 1e-8 turns rounding noise of zero gradients into full steps.
            "eps": 1e-3,
            "warmup_steps": 2,
        },
        "log": {"output": "unused"},
    }
    return RunConfig.model_validate(merge(base, sections))


def _deepspeed_file(folder: Path, stage: int, overlap: bool, *, offload: bool) -> str:
    # Proved with stage 1 on the device alone, and refused elsewhere.
    overlap = overlap and stage == 1 and not offload
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        # By default DeepSpeed would keep all of these small parameters whole on every rank.
        zero["stage3_param_persistence_threshold"] = 1000
    kinds = ("_overlap" if overlap else "") + ("_offload" if offload else "")
    path = folder / f"zero{stage}{kinds}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def make_rows(
    run: RunConfig, *, kind: str, step: int, align: int = 1
) -> tuple[list[MicroBatch], dict[int, torch.Tensor]]:
    """One global batch as single rows, and its pictures by id.

    Args:
        run: Settings: packing, lengths, picture size.
        kind: Key of `SHOWN`.
        step: Seeds the content.
        align: Segments end at multiples of this.
    """
    generator = torch.Generator().manual_seed(100 + step)
    length, tokens_per_image = run.data.seq_length, run.model.tokens_per_image
    size = run.model.vision.image_size if run.model.vision else 1
    rows, pictures = [], {}
    for row, shown in enumerate(SHOWN[kind]):
        tokens = torch.randint(8, run.model.llm.vocab_tokens, (length,), generator=generator)
        slots, at = [], 1
        for number in shown:
            image = 10 * step + number
            tokens[at : at + tokens_per_image] = IMAGE_TOKEN
            slots.append(ImageSlot(image_id=image, row=0, start=at))
            if image not in pictures:
                shape = (3, size, size)
                pictures[image] = torch.randint(
                    0, 256, shape, generator=generator, dtype=torch.uint8
                )
            at += tokens_per_image + 1
        ends = _segment_ends(length, first_text=at, row=row, align=align)
        rows.append(
            _row(
                tokens,
                tuple(slots),
                ends=ends if run.data.packing else None,
                row=row,
                generator=generator,
            )
        )
    return rows, pictures


def _segment_ends(length: int, *, first_text: int, row: int, align: int) -> list[int]:
    """Up to three segments; pictures all lie in the first."""
    unit = max(1, length // LENGTH)
    ends = [first_text + (3 + row % 4) * unit, first_text + (8 + row % 4) * unit, length]
    return sorted({min(-(-end // align) * align, length) for end in ends})


def _row(
    tokens: torch.Tensor,
    slots: tuple[ImageSlot, ...],
    *,
    ends: list[int] | None,
    row: int,
    generator: torch.Generator,
) -> MicroBatch:
    length = len(tokens)
    segments = ends or [length]
    positions, starts = torch.zeros(length, dtype=torch.int64), [0, *segments[:-1]]
    labels, weights = torch.zeros(length, dtype=torch.int64), torch.zeros(length)
    for start, end in zip(starts, segments, strict=True):
        positions[start:end] = torch.arange(end - start)
        labels[start : end - 1] = tokens[start + 1 : end]
        weights[start : end - 1] = (
            torch.rand(end - start - 1, generator=generator) < 0.3 + 0.08 * row
        ).float()
    weights[tokens == IMAGE_TOKEN] = 0.0
    return MicroBatch(
        tokens_BS=tokens[None],
        labels_BS=(labels * (weights > 0))[None],
        weights_BS=weights[None],
        positions_BS=positions[None],
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32) if ends else None,
        max_seqlen=max(e - s for s, e in zip(starts, segments, strict=True)),
        images=slots,
        sample_ids=(row,),
    )


def stack_rows(rows: list[MicroBatch]) -> MicroBatch:
    """Several unpacked rows as one micro-batch."""
    return MicroBatch(
        **{
            name: torch.cat([getattr(row, name) for row in rows])
            for name in ("tokens_BS", "labels_BS", "weights_BS", "positions_BS")
        },
        cu_seqlens=rows[0].cu_seqlens if len(rows) == 1 else None,
        max_seqlen=rows[0].max_seqlen,
        images=tuple(
            ImageSlot(image_id=slot.image_id, row=index, start=slot.start)
            for index, row in enumerate(rows)
            for slot in row.images
        ),
        sample_ids=tuple(i for row in rows for i in row.sample_ids),
    )


def step_input(
    run: RunConfig,
    groups: Groups,
    rows: list[MicroBatch],
    pictures: dict[int, torch.Tensor],
    *,
    step: int = 0,
) -> StepInput:
    """This rank's part of a global batch: replicas take consecutive rows."""
    data, micro = groups.degrees.data, run.batch.micro_size
    share = len(rows) // data
    parts = [rows[rank * share : (rank + 1) * share] for rank in range(data)]
    mine = parts[groups.place.data]
    windows = []
    for cut in cut_windows(share // micro, run.tower.window):
        at = slice(cut.start * micro, cut.stop * micro)
        windows.append(_window(run, groups, [part[at] for part in parts], pictures))
    return StepInput(
        micro_batches=[stack_rows(mine[i : i + micro]) for i in range(0, share, micro)],
        windows=windows,
        trained_tokens=sum(float(row.weights_BS.sum()) for row in rows),
        step=step,
    )


def _window(
    run: RunConfig,
    groups: Groups,
    parts: list[list[MicroBatch]],
    pictures: dict[int, torch.Tensor],
) -> PictureWindow:
    wanted = [[slot.image_id for row in part for slot in row.images] for part in parts]
    dispatch = dispatch_images(wanted, groups.places)
    own = [pictures[image] for image in dispatch.encode[groups.rank]]
    size = run.model.vision.image_size if run.model.vision else 1
    return PictureWindow(
        num_micro_batches=len(parts[0]) // run.batch.micro_size,
        dispatch=dispatch,
        pixels_N3hw=torch.stack(own) if own else torch.zeros((0, 3, size, size), dtype=torch.uint8),
        image_rows=_image_rows(run, parts, context=groups.degrees.context),
    )


def _image_rows(run: RunConfig, parts: list[list[MicroBatch]], *, context: int) -> ImageRows | None:
    if context == 1:
        return None
    layouts = [
        [
            SequenceLayout(
                segments=tuple(segment_lengths(row).tolist()),
                image_ids=tuple(slot.image_id for slot in row.images),
                image_starts=tuple(slot.start for slot in row.images),
            )
            for row in part
        ]
        for part in parts
    ]
    return image_rows(layouts, tokens_per_image=run.model.tokens_per_image, context=context)
