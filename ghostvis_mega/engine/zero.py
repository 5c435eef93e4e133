"""DeepSpeed ZeRO around modules that Megatron-Core's schedule runs: one reduction and one update a
step.

DeepSpeed 0.19's own forward and backward cannot be used inside a pipeline schedule: with several
graphs outstanding its hooks reduce a parameter twice. Gradients therefore accumulate in `.grad` and
are reduced once: those of stages 1 and 2 by `FlatGradients`, those of stage 3 and with offload by
DeepSpeed (`coalesce_grad_reduction`), those of stage 0 here. The global norm, the clip and the
decision to skip are made over all engines at once.
"""

import contextlib
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from torch import nn

from ghostvis_mega.config.deepspeed import ResolvedDeepSpeed
from ghostvis_mega.config.schema import OptimConfig
from ghostvis_mega.engine.finish import average_gradients, fill_missing_gradients, not_finite
from ghostvis_mega.engine.flat_gradients import FlatGradients
from ghostvis_mega.engine.holder import Holder
from ghostvis_mega.engine.mpu import LLMGrid, WorldGrid
from ghostvis_mega.engine.optimizer import build_adamw, host_threads, parameter_groups
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.logging import adopt_deepspeed_logger

adopt_deepspeed_logger()


@contextlib.contextmanager
def _zero_optimizer_for_bf16() -> Iterator[None]:
    """Engines built inside use DeepSpeed's ZeRO optimizer, also for stage 1 in BF16.

    For just that pair with fp32 gradients DeepSpeed selects its BF16_Optimizer, which can neither
    reduce once a step nor leave the norm to us; the optimizer of stage 2 serves stage 1 as well.
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> str | None:
        return ZERO_OPTIMIZATION if engine.zero_optimization() else choose(engine, optimizer)

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


class ZeroEngine:
    """One DeepSpeed engine and the few calls our step makes on it.

    Args:
        holder: Modules to train, never called.
        optim: Optimizer settings.
        settings: Resolved DeepSpeed settings.
        grid: Whose data-parallel group the gradients are averaged over.
        groups: Of this rank.
        device: Where the parameters are.
        fused_wgrad: The modules add weight gradients to `parameter.main_grad` and give autograd
            none (stages 1 and 2).
    """

    def __init__(
        self,
        holder: Holder,
        *,
        optim: OptimConfig,
        settings: ResolvedDeepSpeed,
        grid: LLMGrid | WorldGrid,
        groups: Groups,
        device: torch.device,
        fused_wgrad: bool = False,
    ):
        self.fused_wgrad = fused_wgrad
        self.holder, self.stage, self.grid, self.groups = holder, settings.stage, grid, groups
        self.offload = settings.offload
        self.own_not_finite = torch.zeros((), device=device)
        """1.0 where this rank's own gradients of the step were not finite, before the average."""
        self.trained = [p for p in holder.parameters() if p.requires_grad]
        for parameter in self.trained:
            if parameter.dtype != torch.float32:
                # Micro-batches add up in fp32; bf16 sums would lose small gradients.
                parameter.grad_dtype = torch.float32
        optimizer = build_adamw(
            parameter_groups(holder.named_parameters(), optim),
            optim,
            device=device,
            offload=self.offload,
        )
        config = settings.config
        self.bucket_elements = config["zero_optimization"]["reduce_bucket_size"]
        self.overlap = config["zero_optimization"].get("overlap_comm", False)
        flat = self.stage in (1, 2) and not self.offload
        if flat:
            # We compute one norm over all engines; DeepSpeed's own would be a second one, over one
            # engine.
            config = config | {
                "zero_optimization": config["zero_optimization"]
                | {"compute_grad_norm": False, "overlap_comm": False}
            }
        with _zero_optimizer_for_bf16():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=holder, optimizer=optimizer, config=config, mpu=grid
            )
        if self.stage in (1, 2) and self.offload:
            # DeepSpeed's settings refuse it beside offload for the sake of Muon alone.
            self.optimizer.compute_grad_norm = False
        if self.stage in (1, 2):
            # Else stage 2 with offload would round the fp32 sums of a BF16 model in its buckets.
            self.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
            # Whether to step is decided before, for all engines; DeepSpeed would look through the
            # gradients again, a dozen operations for each of them while the GPU waits.
            self.optimizer.check_grad_overflow = False
        self.flat = FlatGradients(self.optimizer) if flat else None
        if self.stage == 3:
            # Stage 3 takes the rank in TP x PP where stages 1 and 2 take the tensor rank.
            self.optimizer.model_parallel_rank = grid.get_tensor_model_parallel_rank()

    @contextlib.contextmanager
    def reduce_once(self) -> Iterator[None]:
        """Backward passes inside accumulate locally; leaving averages the gradients over data
        parallelism, or with `overlap_comm` begins to, until `reduced`."""
        if self.flat is not None:
            self.flat.begin(fused=self.fused_wgrad)
            yield
            self.own_not_finite = not_finite(self.flat.totals, device=self._device)
            self.flat.end()
            self.flat.reduce()
            if not self.overlap:
                self.flat.wait()
            return
        context = (
            contextlib.nullcontext() if self.stage == 0 else self.engine.coalesce_grad_reduction()
        )
        with context:
            try:
                if self.fused_wgrad:
                    with self._main_grads():
                        yield
                else:
                    yield
            except BaseException:
                self._reduce_nothing()
                raise
            fill_missing_gradients(self.trained)
            own = [p.grad for p in self.trained]
            self.own_not_finite = not_finite(own, device=self._device)
            if self.stage == 1 and self.optimizer.use_grad_accum_attribute:
                # BF16 with offload: stage 1 reduces what DeepSpeed's own backward would have put
                # there.
                self.optimizer.fill_grad_accum_attribute()
        if self.stage == 0:
            average_gradients(
                self.trained,
                self.grid.get_data_parallel_group(),
                bucket_elements=self.bucket_elements,
            )

    def _reduce_nothing(self) -> None:
        """After an error on this rank: DeepSpeed would reduce what gradients there are, and wait
        for ranks that never come. No step follows."""
        self.engine._flush_coalesced_reduction_zero12 = lambda optimizer: None
        self.engine._flush_coalesced_reduction_zero3 = lambda optimizer: None

    @contextlib.contextmanager
    def _main_grads(self) -> Iterator[None]:
        """Backward passes inside find `main_grad`, an fp32 sum, on every parameter.

        It is the parameter's `.grad` itself: modules that know `main_grad` add to it in their GEMM,
        and autograd adds the gradients of all others to the same numbers. Transformer Engine
        returns nothing for a weight without the attribute `grad_added_to_main_grad`, so that
        nothing is added twice.
        """
        sums = [torch.empty_like(parameter, dtype=torch.float32) for parameter in self.trained]
        torch._foreach_zero_(sums)
        for parameter, total in zip(self.trained, sums, strict=True):
            parameter.grad = parameter.main_grad = total
        del sums, total
        yield
        for parameter in self.trained:
            del parameter.main_grad

    def reduced(self) -> None:
        """Wait for a reduction that `reduce_once` has begun."""
        if self.flat is not None and self.overlap:
            self.flat.wait()

    def set_learning_rates(self, factor: float, optim: OptimConfig) -> None:
        """Scale every group's peak learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * getattr(optim.lr, group["module"])

    def square_sum(self) -> torch.Tensor:
        """This rank's share of the squared gradient norm, fp32 scalar.

        Summed over the world, every element of every distinct parameter counts once: shards of ZeRO
        and tensor parallelism add up, replicated copies count on one rank.
        """
        norms = [norm for norm, parameter in self._owned_norms() if self._counts(parameter)]
        if not norms:
            return torch.zeros((), device=self._device)
        return torch.stack(norms).double().square().sum().float()

    @property
    def _device(self) -> torch.device:
        return self.trained[0].device

    @property
    def on_host(self) -> bool:
        """Whether DeepSpeed keeps masters, moments and the update on the host, by its own word."""
        if self.stage == 0:
            return False
        optimizer = self.optimizer
        return optimizer.offload_optimizer if self.stage == 3 else optimizer.cpu_offload

    def _owned_norms(self) -> Iterator[tuple[torch.Tensor, nn.Parameter]]:
        """Norm of each part of a gradient that this rank updates, on the parameters' device."""
        if not self.offload:
            owned = list(self._owned_gradients())
            if owned:
                norms = torch._foreach_norm([gradient.detach().float() for gradient, _ in owned])
                yield from zip(norms, (parameter for _, parameter in owned), strict=True)
            return
        # The gradients are on their way to the host; DeepSpeed took these before they left.
        norms = self.optimizer.norm_for_param_grads
        for parameter in self._offloaded():
            norm = norms[self.optimizer.get_param_id(parameter)]
            yield norm.to(self._device, torch.float32), parameter

    def _offloaded(self) -> Iterator[nn.Parameter]:
        """Parameters of which this rank updates some elements on the host."""
        if self.stage < 3:
            for group in self.optimizer.params_in_partition:
                yield from group
            return
        rank = self.grid.get_data_parallel_rank()
        for group in self.optimizer.fp16_groups:
            # The last ranks have nothing but padding of a small parameter.
            yield from (p for p in group if p.partition_numel() * rank < p.ds_numel)

    def _owned_gradients(self) -> Iterator[tuple[torch.Tensor, nn.Parameter]]:
        if self.stage == 0:
            if self.grid.get_data_parallel_rank() == 0:
                yield from ((p.grad, p) for p in self.trained)
            return
        partitions = (
            self.optimizer.params_in_partition if self.stage < 3 else self.optimizer.fp16_groups
        )
        for index, gradients in self.optimizer.averaged_gradients.items():
            real = [g for g in gradients if not getattr(g, "_zero_padding", False)]
            yield from zip(real, partitions[index], strict=False)

    def _counts(self, parameter: nn.Parameter) -> bool:
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        cut = getattr(parameter, "tensor_model_parallel", False)
        return cut or self.grid.get_tensor_model_parallel_rank() == 0

    def update(self, scale: float) -> None:
        """Multiply all gradients by `scale` and take the optimizer step."""
        if self.stage == 0:
            torch._foreach_mul_([p.grad for p in self.trained], scale)
        else:
            # DeepSpeed divides gradients by its loss scale on the way into the optimizer.
            self.optimizer.override_loss_scale(1.0 / scale)
        with host_threads(self._device) if self.on_host else contextlib.nullcontext():
            self.engine.step()

    def discard(self) -> None:
        """Drop the gradients of a skipped step; weights and optimizer state stay as they are."""
        if self.stage == 0:
            self.engine.zero_grad()
            return
        # Also takes back stage 3's count of accumulated backward passes.
        self.optimizer.zero_grad(set_to_none=True)
        if self.offload:
            # Gradients on the host are overwritten by the next; norms and the verdict on them must
            # not outlive them.
            self.optimizer.reset_cpu_buffers()
        if self.stage == 3:
            self.optimizer.averaged_gradients.clear()
            return
        self.optimizer._release_preflattened_grad_buffers()
        self.optimizer.all_grad_tensors.clear()
        for index in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[index] = None
        # As after a step: the next reduction starts anew instead of adding to this one.
        self.optimizer.micro_step_id = -1

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the parameters; the engine is of no use afterwards."""
        self.engine.destroy()
        # DeepSpeed's list of modules inside their forward begins with the top module of every
        # stage 3 engine and never lets go of it, nor of all that hangs on it.
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self.holder]

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """One parameter whole over data parallelism; with stage 3 collective in the engine's
        group."""
        return (
            deepspeed.utils.safe_get_full_fp32_param(parameter)
            if self.stage == 3
            else parameter.data
        )

    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The fp32 weight that the optimizer updates, whole over data parallelism; collective in
        the engine's group. Stage 0 gives the parameter itself."""
        if self.stage == 0:
            return parameter.data
        return deepspeed.utils.safe_get_full_fp32_param(parameter)

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The averaged gradient of one parameter, whole over data parallelism; collective in the
        engine's group."""
        if self.stage == 0:
            return parameter.grad
        self.reduced()
        return deepspeed.utils.safe_get_full_grad(parameter)
