"""From settings to the modules and ZeRO engines of this rank."""

import logging
from dataclasses import dataclass

import torch

from ghostvis_mega.config.deepspeed import ResolvedDeepSpeed, resolve_deepspeed
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.holder import hold_llm, hold_vision
from ghostvis_mega.engine.mpu import LLMGrid, WorldGrid
from ghostvis_mega.engine.zero import ZeroEngine
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.megatron import Backend, BlockLayout, choose_backend, transformer_config
from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.model.vision_kernels import EngineKernels
from ghostvis_mega.model.vision_layer import FusedLayers
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.parallel.plan import Degrees

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What one rank holds of the model, and the engines that train it."""

    chunks: list[LLMChunk]
    encoder: VisionEncoder | None
    llm_engine: ZeroEngine | None
    """None when the LLM is frozen."""
    vision_engine: ZeroEngine | None
    """None when tower, resampler and projector are all frozen, or there are none."""


def build_parts(run: RunConfig, groups: Groups, *, device: torch.device) -> Parts:
    """Build, initialise and freeze the model of this rank and wrap what trains."""
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    world_size = len(groups.places)
    llm_settings = None
    if "llm" not in run.train.freeze:
        file = run.deepspeed.llm
        llm_settings = resolve_deepspeed(file, run=run, engine="llm", world_size=world_size)
    fused_wgrad = fuses_wgrad(run, llm_settings, device)
    chunks = build_chunks(run, groups, device=device, dtype=dtype, fused_wgrad=fused_wgrad)
    encoder = build_encoder(
        run, device=device, dtype=dtype, fused=fuses_tower(run, device=device, dtype=dtype)
    )
    if llm_settings is None:
        for chunk in chunks:
            chunk.requires_grad_(False)
    if encoder is not None:
        for module, part in (
            ("vision", "tower"),
            ("resampler", "resampler"),
            ("projector", "projector"),
        ):
            if module in run.train.freeze:
                getattr(encoder, part).requires_grad_(False)
    mark_pipeline_copy(chunks, groups)
    llm_engine = vision_engine = None
    if llm_settings is not None:
        llm_engine = ZeroEngine(
            hold_llm(chunks),
            optim=run.optim,
            settings=llm_settings,
            grid=LLMGrid(groups),
            groups=groups,
            device=device,
            fused_wgrad=fused_wgrad,
        )
    if encoder is not None and any(p.requires_grad for p in encoder.parameters()):
        file = run.deepspeed.vision or run.deepspeed.llm
        settings = resolve_deepspeed(file, run=run, engine="vision", world_size=world_size)
        vision_engine = ZeroEngine(
            hold_vision(encoder),
            optim=run.optim,
            settings=settings,
            grid=WorldGrid(groups),
            groups=groups,
            device=device,
            # The fused layers add their own; what else there is, autograd adds.
            fused_wgrad=encoder.fused is not None and settings.stage in (1, 2),
        )
    return Parts(chunks=chunks, encoder=encoder, llm_engine=llm_engine, vision_engine=vision_engine)


def fuses_wgrad(run: RunConfig, settings: ResolvedDeepSpeed | None, device: torch.device) -> bool:
    """Whether the LLM's linear layers add up their weight gradients themselves, in fp32; `settings`
    are None where it is frozen."""
    trained = settings is not None and settings.stage in (1, 2)
    on_gpu = device.type == "cuda" and run.train.precision == "bf16"
    fused = run.train.fused_wgrad and on_gpu and trained
    log.info("weight gradients of the LLM: %s", "by the GEMM, fp32" if fused else "by autograd")
    return fused


def fuses_tower(run: RunConfig, *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the tower's layers run on Transformer Engine's kernels."""
    fused = run.tower.fused and device.type == "cuda" and dtype == torch.bfloat16
    if run.model.vision is not None:
        log.info("layers of the tower: %s", "fused" if fused else "PyTorch's operations")
    return fused


def block_layout(run: RunConfig, degrees: Degrees) -> BlockLayout:
    """What Megatron-Core's layers are told of the parallel layout."""
    # A reference in one process takes the run's settings, but has no stages.
    cut = degrees.pipeline > 1
    return BlockLayout(
        tensor=degrees.tensor,
        sequence_parallel=run.parallel.sequence_parallel and degrees.tensor > 1,
        pipeline=degrees.pipeline,
        virtual_pipeline=degrees.virtual_pipeline,
        context=degrees.context,
        first_stage_layers=run.parallel.first_stage_layers if cut else None,
        last_stage_layers=run.parallel.last_stage_layers if cut else None,
    )


def build_chunks(
    run: RunConfig,
    groups: Groups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend | None = None,
    fused_wgrad: bool = False,
    fused_loss: bool | None = None,
    fused_rope: bool | None = None,
) -> list[LLMChunk]:
    """The LLM chunks of this pipeline stage, initialised.

    Args:
        run: Settings.
        groups: Of this rank.
        device: Of the parameters.
        dtype: Of the parameters.
        backend: Layer implementation; by default the one that suits the device.
        fused_wgrad: Weight gradients go to `main_grad`, which `ZeroEngine` provides.
        fused_loss: In place of what the run says.
        fused_rope: The same.
    """
    degrees, llm = groups.degrees, run.model.llm
    backend = backend or choose_backend(device)
    layout = block_layout(run, degrees)
    config = transformer_config(
        llm,
        layout=layout,
        dtype=dtype,
        backend=backend,
        recompute=run.train.recompute,
        fp8=run.train.fp8 if backend == "te" else "none",
        fused_wgrad=fused_wgrad,
    )
    log.info(
        "LLM layers: %s",
        "Transformer Engine" if backend == "te" else "Megatron-Core with SDPA attention",
    )
    chunks = []
    for number in range(degrees.virtual_pipeline):
        chunk = LLMChunk(
            config,
            llm,
            groups=groups.megatron,
            backend=backend,
            first=groups.is_first_stage and number == 0,
            last=groups.is_last_stage and number == degrees.virtual_pipeline - 1,
            chunk=number if degrees.virtual_pipeline > 1 else None,
            fused_loss=run.train.fused_loss if fused_loss is None else fused_loss,
            fused_rope=run.train.fused_rope if fused_rope is None else fused_rope,
        ).to(device)
        chunk.initialize(run.train.seed)
        chunks.append(chunk)
    return chunks


def build_encoder(
    run: RunConfig, *, device: torch.device, dtype: torch.dtype, fused: bool = False
) -> VisionEncoder | None:
    """The vision encoder, whole on every rank and initialised alike; None for a text-only model.

    Args:
        run: Settings.
        device: Of the parameters.
        dtype: Of the parameters.
        fused: Run the tower's layers on Transformer Engine's kernels.
    """
    if run.model.vision is None:
        return None
    layers = FusedLayers(EngineKernels()) if fused else None
    encoder = VisionEncoder(run.model, fused=layers).to(device)
    for part in (encoder.tower, encoder.resampler, encoder.projector):
        part.to(dtype)
    encoder.initialize(run.train.seed)
    return encoder


def mark_pipeline_copy(chunks: list[LLMChunk], groups: Groups) -> None:
    """Mark the last stage's copy of tied embeddings, so that the gradient norm counts the parameter
    once."""
    for chunk in chunks:
        if groups.degrees.pipeline > 1 and chunk.llm.tied_embeddings and hasattr(chunk, "head"):
            chunk.head.weight.ds_pipe_replicated = True
