"""Megatron-Core's configuration and layer specs for our LLM: one for CPUs, one of Transformer
Engine layers."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ghostvis_mega.config.schema import LLMConfig
from ghostvis_mega.model.attention import SDPACoreAttention
from ghostvis_mega.model.dropout import ATTENTION, MLP, DropoutAdd, DropoutLayer
from ghostvis_mega.model.rope import FusedRotarySelfAttention

log = logging.getLogger(__name__)

Backend = Literal["cpu", "te"]


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """The part of the parallel layout that Megatron-Core's layers must know."""

    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None


class RMSNorm(nn.Module):
    """RMSNorm whose weight tells the engine when its gradient is partial (sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def choose_backend(device: torch.device) -> Backend:
    """Transformer Engine where there is CUDA, else PyTorch layers."""
    return "te" if device.type == "cuda" else "cpu"


def transformer_config(
    llm: LLMConfig,
    *,
    layout: BlockLayout,
    dtype: torch.dtype,
    backend: Backend,
    recompute: str = "none",
    fp8: str = "none",
    fused_wgrad: bool = False,
) -> TransformerConfig:
    """Megatron-Core's configuration of the LLM.

    Args:
        llm: Our settings.
        layout: Parallel degrees.
        dtype: Of parameters and activations.
        backend: Which layers will be built.
        recompute: Activation checkpointing: "none", "selective" (each layer's MLP) or "full"
            (every layer).
        fp8: Recipe of the linear layers: "none", "delayed", "tensorwise" or "blockwise".
        fused_wgrad: The linear layers add weight gradients to `weight.main_grad`, which the engine
            must provide, instead of returning them to autograd.
    """
    on_gpu = backend == "te"
    return TransformerConfig(
        num_layers=llm.num_layers,
        hidden_size=llm.hidden_size,
        num_attention_heads=llm.num_heads,
        num_query_groups=llm.num_kv_heads,
        kv_channels=llm.head_dim,
        ffn_hidden_size=llm.ffn_hidden_size,
        activation_func=F.silu if llm.activation == "swiglu" else squared_relu,
        gated_linear_unit=llm.activation == "swiglu",
        add_bias_linear=False,
        add_qkv_bias=llm.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=llm.norm_eps,
        hidden_dropout=llm.hidden_dropout,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Initial values come from `model.init`, the same in every layout.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        # The batched exchange mixes up activations and gradients when the previous and the next
        # stage are the same rank (two stages, interleaved): wrong numbers without an error.
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        bias_activation_fusion=on_gpu and llm.activation == "swiglu",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=fused_wgrad,
        apply_rope_fusion=on_gpu,
        # Megatron-Core then leaves out its own kernels that add in any order.
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        **_layout_settings(layout),
        **_RECOMPUTE_SETTINGS[recompute],
        **_fp8_settings(fp8),
    )


_RECOMPUTE_SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    # Whoever trains has settled it (engine/recompute.py); here is a reference, or answers alone.
    "auto": {},
    # Fused attention keeps no scores, so running it again would cost time and save nothing; the
    # MLP's wide activations are most of what a layer holds.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def _layout_settings(layout: BlockLayout) -> dict[str, Any]:
    interleaved = layout.virtual_pipeline > 1
    # Of two stages the last follows from the first; told both, Megatron-Core divides what is left
    # by no stages.
    follows = layout.pipeline == 2 and layout.first_stage_layers
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel and layout.tensor > 1,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if interleaved else None,
        "context_parallel_size": layout.context,
        # Transformer Engine's ring: keys and values travel while attention runs.
        "cp_comm_type": "p2p",
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": None if follows else layout.last_stage_layers,
    }


def _fp8_settings(fp8: str) -> dict[str, Any]:
    if fp8 == "none":
        return {}
    # E4M3 forward, E5M2 for gradients; per block both fit into E4M3.
    settings = {"fp8": "e4m3" if fp8 == "blockwise" else "hybrid", "fp8_recipe": fp8}
    if fp8 == "delayed":
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return settings


def block_spec(
    config: TransformerConfig, *, num_layers: int, backend: Backend, fused_rope: bool = False
) -> TransformerBlockSubmodules:
    """The layers of one model chunk and its final norm.

    Args:
        config: Megatron-Core's configuration.
        num_layers: Of the chunk.
        backend: Layer implementation.
        fused_rope: Attention wants one row of angles for each row of activations; see `model.rope`.
    """
    layer: ModuleSpec
    final_norm: Callable
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, final_norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
        final_norm = RMSNorm
    if fused_rope:
        layer.submodules.self_attention.module = FusedRotarySelfAttention
    if config.hidden_dropout > 0:
        layer.module = DropoutLayer
        layer.submodules.self_attn_bda = ModuleSpec(module=DropoutAdd, params={"site": ATTENTION})
        layer.submodules.mlp_bda = ModuleSpec(module=DropoutAdd, params={"site": MLP})
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)
