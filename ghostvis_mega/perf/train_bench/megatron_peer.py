"""The Megatron-Core peer: GPTModel, DistributedDataParallel and the distributed optimizer."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.transformer_config import TransformerConfig

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.engine.build import block_layout
from ghostvis_mega.model.megatron import block_spec, choose_backend, transformer_config
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.train_bench.peer import PeerStep, PeerTrainer

_LLM = "llm"


class MegatronTrainer(PeerTrainer):
    """Megatron-Core as its users train with it: Transformer Engine layers, sequence parallelism,
    fused cross-entropy, gradients in fp32, reductions and gathers overlapped, clip by its
    optimizer.

    Args:
        run: Settings; the layout is tensor x data.
        groups: Of this rank.
        device: Of this rank.
        fused_wgrad: Let Transformer Engine's GEMMs add weight gradients to the fp32 buffer.
    """

    def __init__(self, run: RunConfig, groups: Groups, *, device: torch.device, fused_wgrad: bool):
        super().__init__(run, groups, device=device)
        # Once more, for the modules that only this peer imports.
        apply_cpu_shim()
        self.config = peer_config(run, groups, device=device)
        model = build_model(self.config, run, groups, device=device)
        fused = fuse_wgrad(model) if fused_wgrad and device.type == "cuda" else 0
        overlap = groups.degrees.data > 1
        with cuda_type_names(device):
            self.model = DistributedDataParallel(
                self.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=overlap,
                    overlap_param_gather=overlap,
                    use_distributed_optimizer=True,
                ),
                model,
            )
            self.model.broadcast_params()
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=run.optim.lr.llm,
                    weight_decay=run.optim.weight_decay,
                    adam_beta1=run.optim.betas[0],
                    adam_beta2=run.optim.betas[1],
                    adam_eps=run.optim.eps,
                    clip_grad=run.optim.clip_norm,
                    bf16=self.config.bf16,
                    params_dtype=self.config.params_dtype,
                    use_distributed_optimizer=True,
                    overlap_param_gather=overlap,
                ),
                [self.model],
                use_gloo_process_groups=False,
            )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if overlap:
            self.config.no_sync_func = self.model.no_sync
        inner = getattr(self.optimizer, "chained_optimizers", [self.optimizer])[0]
        self.description = {
            "model": "Megatron-Core GPTModel, "
            + ("Transformer Engine" if device.type == "cuda" else "local layers"),
            "layout": f"{groups.degrees.describe()}, micro-batches of {run.batch.micro_size}",
            "optimizer": f"{type(inner).__name__} over {type(inner.optimizer).__name__}",
            "fused wgrad": f"{fused} layers" if fused else "off",
            "recompute": run.train.recompute,
            "precision": run.train.precision
            + ("" if run.train.fp8 == "none" else f", FP8 {run.train.fp8}"),
        }

    def train(self, work: PeerStep) -> torch.Tensor:
        """One call of Megatron-Core's schedule, then its optimizer."""
        count = len(work.micro_batches)
        with self.timer.section("forward and backward"):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            shares = forward_backward_no_pipelining(
                forward_step_func=_ForwardStep(self.device, scale=work.loss_scale * count),
                data_iterator=iter(work.micro_batches),
                model=[self.model],
                num_microbatches=count,
                seq_length=self.run.data.seq_length,
                micro_batch_size=self.run.batch.micro_size,
            )
        with self.timer.section("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(work.step, _LLM)
            with cuda_type_names(self.device):
                taken, *_ = self.optimizer.step()
            assert taken, "without a loss scaler each step is taken"
        return torch.stack([share["loss"] for share in shares]).sum() / count


class _ForwardStep:
    """What Megatron-Core's schedule calls for each micro-batch."""

    def __init__(self, device: torch.device, *, scale: float):
        self.device, self.scale = device, scale

    def __call__(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(batches)
        tokens_BS, positions_BS, labels_BS, weights_BS = (
            x.to(self.device, non_blocking=True)
            for x in (batch.tokens_BS, batch.positions_BS, batch.labels_BS, batch.weights_BS)
        )
        loss_BS = model(tokens_BS, positions_BS, None, labels=labels_BS)

        def loss_of(out_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = (out_BS.float() * weights_BS).sum() * self.scale
            # The schedule divides `loss` in place.
            return loss, {"loss": loss.detach().clone()}

        return loss_BS, loss_of


def peer_config(run: RunConfig, groups: Groups, *, device: torch.device) -> TransformerConfig:
    """Our LLM's sizes with the fusions that Megatron-LM's users turn on."""
    on_gpu = device.type == "cuda"
    config = transformer_config(
        run.model.llm,
        layout=block_layout(run, groups.degrees),
        dtype=torch.bfloat16 if run.train.precision == "bf16" else torch.float32,
        backend=choose_backend(device),
        recompute=run.train.recompute,
        fp8=run.train.fp8 if on_gpu else "none",
    )
    return dataclasses.replace(
        config,
        perform_initialization=True,
        init_method=None,
        output_layer_init_method=None,
        embedding_init_method=None,
        embedding_init_method_std=None,
        init_method_std=run.model.llm.init_std,
        bias_dropout_fusion=on_gpu,
        cross_entropy_loss_fusion=on_gpu,
        # Megatron-LM refuses that of Transformer Engine.
        cross_entropy_fusion_impl="native",
    )


def build_model(
    config: TransformerConfig, run: RunConfig, groups: Groups, *, device: torch.device
) -> GPTModel:
    """GPTModel on its device, random weights."""
    llm = run.model.llm
    spec = block_spec(config, num_layers=llm.num_layers, backend=choose_backend(device))
    model = GPTModel(
        config,
        spec,
        vocab_size=llm.vocab_size,
        max_sequence_length=run.data.seq_length,
        share_embeddings_and_output_weights=llm.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(llm.rope_base),
    )
    return model.to(device)


def fuse_wgrad(model: torch.nn.Module) -> int:
    """Let Transformer Engine's layers add weight gradients to `main_grad`; returns how many do.

    Megatron-Core's own switch would ask the same of the output layer, which is not Transformer
    Engine's and needs NVIDIA apex for it.
    """
    layers = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return len(layers)


@contextlib.contextmanager
def cuda_type_names(device: torch.device) -> Iterator[None]:
    """On a CPU: let Megatron-Core's optimizer take CPU tensors for CUDA's.

    It asks tensors for the name of their type and refuses all but those of CUDA; nothing else of it
    needs a GPU.
    """
    if device.type != "cpu":
        yield
        return
    honest = torch.Tensor.type

    def name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = honest(self, *args, **kwargs)
        if isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = name
    try:
        yield
    finally:
        torch.Tensor.type = honest
