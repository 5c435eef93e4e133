"""Rules between settings, as sentences: pure arithmetic, no file is read, nothing is imported.

What a layout needs was measured: see docs of the engine. A combination that computes something
wrong, hangs or silently ignores a setting is refused here, before any process group exists.
"""

from collections.abc import Iterator
from typing import Literal

from ghostvis_mega.config.rules_data import blend_problems
from ghostvis_mega.config.rules_layout import context_problems
from ghostvis_mega.config.rules_model import (
    choices,
    data_fit_problems,
    divisors,
    model_problems,
    vision_notes,
)
from ghostvis_mega.config.rules_pipeline import pipeline_problems
from ghostvis_mega.config.rules_precision import fp8_notes, fp8_problems, tower_problems
from ghostvis_mega.config.schema import RunConfig

Device = Literal["cpu", "cuda"]


def find_problems(cfg: RunConfig, *, world_size: int, device: Device) -> list[str]:
    """All broken rules of a run, one sentence each with the fix.

    Args:
        cfg: The run.
        world_size: Number of processes.
        device: Where it will run.
    """
    found = [
        *model_problems(cfg.model),
        *data_fit_problems(cfg.model, cfg.data.seq_length),
        *_layout_problems(cfg, world_size),
        *_division_problems(cfg),
        *context_problems(cfg),
        *pipeline_problems(cfg),
        *_batch_problems(cfg, world_size),
        *_data_problems(cfg),
        *blend_problems(cfg),
        *_freeze_problems(cfg),
        *_optim_problems(cfg),
        *_guard_problems(cfg),
        *_log_problems(cfg),
        *_device_problems(cfg, device),
        *fp8_problems(cfg, device=device),
        *tower_problems(cfg, device=device),
    ]
    return list(dict.fromkeys(found))


def _replica(cfg: RunConfig) -> int:
    """Processes of one model replica."""
    return cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.context


def _layout_problems(cfg: RunConfig, world_size: int) -> Iterator[str]:
    p = cfg.parallel
    if world_size % _replica(cfg):
        parts = f"parallel.tensor={p.tensor} x parallel.pipeline={p.pipeline}"
        parts += f" x parallel.context={p.context}" if p.context > 1 else ""
        yield (
            f"{parts} = {_replica(cfg)} processes a replica does not divide the world of "
            f"{world_size}. Start a multiple of {_replica(cfg)} processes, or lower the degrees."
        )
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={p.virtual_pipeline} interleaves pipeline stages, but "
            "parallel.pipeline=1. Set virtual_pipeline: 1, or pipeline to 2 or more."
        )
    if cfg.tower.window and cfg.model.vision is None:
        yield (
            f"tower.window={cfg.tower.window} is about pictures, but model.vision is null. Set "
            "tower.window: 0."
        )
    if cfg.tower.window and p.pipeline > 1:
        yield (
            f"tower.window={cfg.tower.window} would empty the pipeline after each window, but "
            f"parallel.pipeline={p.pipeline}. Set tower.window: 0, or pipeline: 1."
        )


def _division_problems(cfg: RunConfig) -> Iterator[str]:
    p, llm = cfg.parallel, cfg.model.llm
    sizes = {
        "num_heads": llm.num_heads,
        "num_kv_heads": llm.num_kv_heads,
        "ffn_hidden_size": llm.ffn_hidden_size,
        "vocab_size": llm.vocab_size,
    }
    fitting = choices(divisors(*sizes.values()))
    for name, size in sizes.items():
        if size % p.tensor:
            yield (
                f"parallel.tensor={p.tensor} does not divide model.llm.{name}={size}. "
                f"Use {fitting}, or change {name}."
            )
    if p.context == 1 and p.tensor > 1 and p.sequence_parallel and cfg.data.seq_length % p.tensor:
        length = -(-cfg.data.seq_length // p.tensor) * p.tensor
        yield (
            f"data.seq_length={cfg.data.seq_length} is no multiple of parallel.tensor={p.tensor}, "
            f"over which parallel.sequence_parallel splits it. Use {length}, or "
            "sequence_parallel: false."
        )


def _batch_problems(cfg: RunConfig, world_size: int) -> Iterator[str]:
    batch, p = cfg.batch, cfg.parallel
    if cfg.data.packing and batch.micro_size != 1:
        yield (
            f"batch.micro_size={batch.micro_size} with data.packing=true: a pack is one long "
            "sequence already. Set micro_size: 1 and a larger data.seq_length, or packing: false."
        )
    if not cfg.data.packing and cfg.data.pack_algorithm != "balanced":
        yield (
            f"data.pack_algorithm={cfg.data.pack_algorithm} with data.packing=false: rows hold one "
            "sample each. Set packing: true, or leave pack_algorithm out."
        )
    if world_size % _replica(cfg):
        return
    replicas = world_size // _replica(cfg)
    step = replicas * batch.micro_size
    if batch.global_size % step:
        near = [n * step for n in (batch.global_size // step, batch.global_size // step + 1) if n]
        yield (
            f"batch.global_size={batch.global_size} is no multiple of {replicas} data-parallel "
            f"replicas x batch.micro_size={batch.micro_size}. Use {choices(near)}."
        )
        return
    count = batch.global_size // step
    if p.virtual_pipeline > 1 and p.pipeline > 1 and count % p.pipeline:
        near = (count // p.pipeline + 1) * p.pipeline * step
        yield (
            f"batch.global_size={batch.global_size} gives {count} micro-batches a replica, which "
            f"the interleaved schedule needs in multiples of parallel.pipeline={p.pipeline}. "
            f"Use batch.global_size={near}, or parallel.virtual_pipeline=1."
        )


def _data_problems(cfg: RunConfig) -> Iterator[str]:
    data = cfg.data
    if data.heldout is not None and data.heldout == data.train:
        yield (
            f"data.heldout={data.heldout} is data.train: an accuracy on it would be of learning "
            "by heart. Name another dataset."
        )
    if data.augment and cfg.model.vision is None:
        yield (
            "data.augment=true changes pictures, but the model has no vision part. Set it to "
            "false, or use a preset with one (vlm_...)."
        )


def _freeze_problems(cfg: RunConfig) -> Iterator[str]:
    freeze, modules = cfg.train.freeze, cfg.model.modules
    for name in dict.fromkeys(freeze):
        if freeze.count(name) > 1:
            yield f"train.freeze names {name} {freeze.count(name)} times. Keep one."
        if name not in modules:
            kind = cfg.model.connector.kind if cfg.model.connector else "none"
            why = f" (model.connector.kind={kind})" if name == "resampler" else ""
            yield (
                f"train.freeze names {name}, which this model does not have{why}. Remove it; the "
                f"model has {', '.join(modules)}."
            )
    if not cfg.trained_modules:
        yield (
            f"train.freeze=[{', '.join(freeze)}] freezes everything, so nothing would be trained. "
            f"Leave out at least one of {', '.join(modules)}."
        )
    if cfg.deepspeed.vision is not None and not set(cfg.trained_modules) - {"llm"}:
        yield (
            f"deepspeed.vision={cfg.deepspeed.vision} has no engine to configure: no vision part "
            "is trained. Remove it."
        )


def _optim_problems(cfg: RunConfig) -> Iterator[str]:
    optim, steps = cfg.optim, cfg.train.steps
    for name in cfg.trained_modules:
        if getattr(optim.lr, name) == 0:
            yield (
                f"optim.lr.{name}=0 would train {name} without moving it, at full cost. Add "
                f"{name} to train.freeze, or give a rate."
            )
    if optim.warmup_steps and optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} leaves no step of train.steps={steps} at "
            f"the peak rate. Use fewer than {steps}."
        )
    for place, beta in enumerate(optim.betas):
        if beta == 1:
            yield (
                f"optim.betas[{place}]=1 never forgets and divides by zero in AdamW. Use 0.9 and "
                "0.95, or any below 1."
            )


def _log_problems(cfg: RunConfig) -> Iterator[str]:
    log, steps = cfg.log, cfg.train.steps
    if cfg.data.heldout is None:
        if log.evaluate:
            yield "log.evaluate=true needs data.heldout, the questions to answer. Set data.heldout."
        if log.preview_steps:
            yield (
                f"log.preview_steps={list(log.preview_steps)} needs data.heldout, the samples to "
                "show. Set data.heldout, or preview_steps: []."
            )
    late = [step for step in log.preview_steps if step > steps]
    if late:
        yield (
            f"log.preview_steps={late} lie after the last step: train.steps={steps}. Use steps "
            f"up to {steps}."
        )
    if log.preview_steps and log.preview_samples == 0:
        yield "log.preview_samples=0 with log.preview_steps shows nothing. Use 8, or no steps."


def _guard_problems(cfg: RunConfig) -> Iterator[str]:
    if cfg.guards.spike == "rollback" and cfg.checkpoint.save_every == 0:
        yield (
            "guards.spike=rollback goes back to the last checkpoint, but checkpoint.save_every=0 "
            "saves none before the end. Set checkpoint.save_every, or guards.spike: skip."
        )


def _device_problems(cfg: RunConfig, device: Device) -> Iterator[str]:
    wanted = cfg.train.device
    if wanted == "cuda" and device == "cpu":
        yield (
            "train.device=cuda, but no CUDA device is visible. Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or set train.device: auto."
        )
    if cfg.train.ranks_per_gpu > 1 and device == "cpu":
        yield (
            f"train.ranks_per_gpu={cfg.train.ranks_per_gpu} lets ranks share a GPU, and this run "
            "has none. Leave it out, or run on a GPU."
        )


def find_notes(cfg: RunConfig, *, world_size: int) -> list[str]:
    """Advice on what works but may surprise.

    Args:
        cfg: A run without problems.
        world_size: Number of processes.
    """
    p, notes = cfg.parallel, []
    count = cfg.batch.global_size // (world_size // _replica(cfg) * cfg.batch.micro_size)
    idle = (p.pipeline - 1) / (count * p.virtual_pipeline)
    if idle > 0.25:
        notes.append(
            f"The pipeline idles {idle:.0%} of its working time with {count} micro-batches: raise "
            "batch.global_size or parallel.virtual_pipeline."
        )
    if cfg.model.vision is not None and cfg.model.vision.post_norm:
        notes.append(
            "model.vision.post_norm=true: LLaVA feeds the features before the final norm, so this "
            "model can be exported with custom code only."
        )
    if p.tensor > 1 and not p.sequence_parallel:
        notes.append(
            "parallel.sequence_parallel=false: norms and residuals are held whole on each of the "
            f"{p.tensor} tensor-parallel ranks."
        )
    if cfg.train.deterministic:
        notes.append(
            "train.deterministic=true: steps take longer; bits are equal for the same layout, kind "
            "of machine and versions."
        )
    if cfg.optim.clip_norm == 0:
        notes.append("optim.clip_norm=0: gradients are not clipped.")
    return [*notes, *vision_notes(cfg.model.vision), *fp8_notes(cfg)]
