"""A small training problem that all layouts solve: settings, rows with pictures, pictures."""

import json
from pathlib import Path
from typing import Any

import torch

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.parallel.groups import Groups

IMAGE_TOKEN = 5
LENGTH = 32
ROWS = 8
STEPS = 3

MODEL: dict[str, Any] = {
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


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    out = dict(base)
    for key, value in over.items():
        out[key] = (
            merge(out[key], value)
            if isinstance(value, dict) and isinstance(out.get(key), dict)
            else value
        )
    return out


def make_run(folder: Path, *, stage: int = 1, overlap: bool = False, **sections: Any) -> RunConfig:
    """Settings of one layout.

    Args:
        folder: Takes the DeepSpeed files.
        stage: ZeRO stage of both engines; the vision engine stays at 2 where the LLM has 3.
        overlap: DeepSpeed's `overlap_comm`.
        sections: Keys of the settings' sections that differ from the base.
    """
    files = {"llm": _deepspeed_file(folder, stage, overlap)}
    if stage == 3:
        files["vision"] = _deepspeed_file(folder, 2, overlap)
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


def _deepspeed_file(folder: Path, stage: int, overlap: bool) -> str:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap}
    if stage == 3:
        # By default DeepSpeed would keep all of these small parameters whole on every rank.
        zero["stage3_param_persistence_threshold"] = 1000
    path = folder / f"parity_zero{stage}{'_overlap' if overlap else ''}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


SHOWN = {
    # In rows 2 and 3 the same picture (one replica), in rows 0 and 4 another (two replicas), in
    # row 7 one twice.
    "mixed": [(0,), (), (1, 2), (1,), (3, 4, 0), (), (5,), (5, 6, 5)],
    "text": [()] * ROWS,
    "one": [(0,) if row == 2 else () for row in range(ROWS)],
}
"""Pictures of each row: no, one and several; none at all; one in the whole batch."""


def make_rows(
    run: RunConfig, *, kind: str, step: int
) -> tuple[list[MicroBatch], dict[int, torch.Tensor]]:
    """One global batch as single rows, and its pictures by id.

    Args:
        run: Settings: packing, picture size.
        kind: Key of `SHOWN`.
        step: Seeds the content.
    """
    generator = torch.Generator().manual_seed(100 + step)
    tokens_per_image, size = run.model.tokens_per_image, run.model.vision.image_size
    rows, pictures = [], {}
    for row, shown in enumerate(SHOWN[kind]):
        tokens = torch.randint(8, run.model.llm.vocab_size, (LENGTH,), generator=generator)
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
        rows.append(_row(run, tokens, tuple(slots), first_text=at, row=row, generator=generator))
    return rows, pictures


def _row(
    run: RunConfig,
    tokens: torch.Tensor,
    slots: tuple[ImageSlot, ...],
    *,
    first_text: int,
    row: int,
    generator,
) -> MicroBatch:
    # Packed rows hold up to three samples; pictures all lie in the first.
    ends = [LENGTH]
    if run.data.packing:
        middle = first_text + 3 + row % 4
        ends = [middle, middle + 5, LENGTH] if middle + 5 < LENGTH else [middle, LENGTH]
    positions, starts = torch.zeros(LENGTH, dtype=torch.int64), [0, *ends[:-1]]
    labels, weights = torch.zeros(LENGTH, dtype=torch.int64), torch.zeros(LENGTH)
    for start, end in zip(starts, ends, strict=True):
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
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32) if run.data.packing else None,
        max_seqlen=max(e - s for s, e in zip(starts, ends, strict=True))
        if run.data.packing
        else LENGTH,
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
    run: RunConfig, groups: Groups, rows: list[MicroBatch], pictures: dict[int, torch.Tensor]
) -> StepInput:
    """This rank's part of a global batch: replicas take consecutive rows."""
    data, micro = groups.degrees.data, run.batch.micro_size
    share = len(rows) // data
    parts = [rows[rank * share : (rank + 1) * share] for rank in range(data)]
    wanted = [[slot.image_id for row in part for slot in row.images] for part in parts]
    dispatch = dispatch_images(wanted, groups.places)
    own = [pictures[image] for image in dispatch.encode[groups.rank]]
    size = run.model.vision.image_size if run.model.vision else 1
    mine = parts[groups.place.data]
    return StepInput(
        micro_batches=[stack_rows(mine[i : i + micro]) for i in range(0, share, micro)],
        dispatch=dispatch,
        pixels_N3hw=torch.stack(own) if own else torch.zeros((0, 3, size, size), dtype=torch.uint8),
        trained_tokens=sum(float(row.weights_BS.sum()) for row in rows),
    )
