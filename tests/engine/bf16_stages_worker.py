"""Two ranks train in BF16 with each ZeRO stage: is the reduction exact, the step the same?"""

import hashlib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import nn

from ghostvis_mega.engine import build, zero
from ghostvis_mega.engine.flat_gradients import FlatGradients
from ghostvis_mega.engine.inspect import owned_parameters
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.vision_kernels import PlainKernels
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.perf.certify.lab import Lab
from ghostvis_mega.perf.certify.layout import Layout
from tests.launch import write_result

BF16 = {"train": {"precision": "bf16"}}
HOST = ("llm", "vision")
LAYOUTS = {
    "stage 1": Layout(name="stage 1", stage=1, problem=BF16),
    "stage 2": Layout(name="stage 2", stage=2, problem=BF16),
    "stage 3": Layout(name="stage 3", stage=3, problem=BF16),
    "stage 1 on the host": Layout(name="1 host", stage=1, problem=BF16, offload=HOST),
    "stage 2 on the host": Layout(name="2 host", stage=2, problem=BF16, offload=HOST),
}
STEPS = 3


def main() -> None:
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    torch.set_num_threads(1)
    apply_cpu_shim()
    dist.init_process_group("gloo")
    lab = Lab(Path(os.environ["LAUNCH_FOLDER"]) / "lab")
    rows = {name: train(lab, layout) for name, layout in LAYOUTS.items()}
    with fused_wgrad() as calls:
        rows["fused"] = train(lab, LAYOUTS["stage 2"]) | {"calls": len(calls)}
        rows["fused, stage 1"] = train(lab, LAYOUTS["stage 1"])
        for stage in (1, 2):
            name = f"stage {stage} on the host"
            rows[f"fused, {name}"] = train(lab, LAYOUTS[name])
    with fused_wgrad(forgets=2) as calls:
        rows["fused, forgetful"] = train(lab, LAYOUTS["stage 2"])
    with fused_tower():
        rows["fused tower"] = train(lab, LAYOUTS["stage 2"])
    rows["buckets in BF16"] = train(lab, LAYOUTS["stage 2 on the host"], bucket=torch.bfloat16)
    with sums_in_bf16():
        rows["sums in BF16"] = train(lab, LAYOUTS["stage 2"])
    if dist.get_rank() == 0:
        write_result(rows)
    dist.barrier()
    dist.destroy_process_group()


def train(lab: Lab, layout: Layout, *, bucket: torch.dtype | None = None) -> dict:
    """A row of one layout; `bucket` is what the LLM's reduction buckets are made of instead."""
    case = lab.case(layout)
    engine = lab.engine(case)
    if bucket is not None:
        engine.parts.llm_engine.optimizer._gradient_reduction_buffer_dtype = lambda: bucket
    digest, norms, losses, errors = hashlib.sha256(), [], [], []
    for step in range(STEPS):
        batch = case.stream.step_input(case.run, engine.groups, step)
        local: dict[int, torch.Tensor] = {}
        with (
            mock.patch.object(zero, "fill_missing_gradients", fill_and_keep(local)),
            mock.patch.object(FlatGradients, "end", end_and_keep(local)),
        ):
            loss_sum = engine.accumulate(batch)
        errors.append(reduction_error(engine, local))
        result = engine.update(loss_sum, batch, step=step)
        norms.append(result.grad_norm)
        losses.append(result.loss)
    for name, parameter in owned_parameters(engine):
        assert parameter.dtype == torch.bfloat16, name
        digest.update(name.encode() + parameter.detach().view(torch.int16).numpy().tobytes())
    held = [weakref.ref(thing) for own in engine.engines for thing in (own.engine, own.holder)]
    del parameter
    engine.close()
    return {
        "held": sum(thing() is not None for thing in held),
        "losses": losses,
        "norms": norms,
        "reduction_error": max(errors),
        "weights": digest.hexdigest(),
    }


@contextmanager
def fused_tower() -> Iterator[None]:
    """The tower as on GPUs, but for the kernels."""
    with (
        mock.patch.object(build, "fuses_tower", lambda *_, **__: True),
        mock.patch.object(build, "EngineKernels", PlainKernels),
    ):
        yield


@contextmanager
def sums_in_bf16() -> Iterator[None]:
    """What is reduced is rounded before."""
    reduce = FlatGradients.reduce

    def rounded(flat: FlatGradients) -> None:
        for total in flat.totals:
            total.copy_(total.bfloat16())
        reduce(flat)

    with mock.patch.object(FlatGradients, "reduce", rounded):
        yield


@contextmanager
def fused_wgrad(forgets: int = -1) -> Iterator[list[int]]:
    """The LLM's layers add weight gradients to `main_grad` as a fused GEMM does.

    Megatron-Core's own layers do so with APEX's kernel, here a stand-in with its interface.

    Args:
        forgets: Call that adds nothing.

    Yields:
        Calls of the kernel.
    """
    calls: list[int] = []

    def accumulate(x_RK: torch.Tensor, grad_RN: torch.Tensor, main_NK: torch.Tensor) -> None:
        assert main_NK.dtype == torch.float32
        if len(calls) != forgets:
            main_NK += grad_RN.float().t() @ x_RK.float()
        calls.append(main_NK.numel())

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(build, "fuses_wgrad", lambda *_: True),
    ):
        yield calls


def fill_and_keep(local: dict[int, torch.Tensor]) -> Callable[[Iterable[nn.Parameter]], None]:
    """`fill_missing_gradients`, which also copies what is about to be reduced."""
    fill = zero.fill_missing_gradients

    def filled(parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        fill(parameters)
        keep(parameters, local)

    return filled


def end_and_keep(local: dict[int, torch.Tensor]) -> Callable[[FlatGradients], None]:
    """`FlatGradients.end`, which also copies what is about to be reduced."""
    end = FlatGradients.end

    def ended(flat: FlatGradients) -> None:
        keep([parameter for parameter, _ in flat._views], local)
        end(flat)

    return ended


def keep(parameters: Iterable[nn.Parameter], local: dict[int, torch.Tensor]) -> None:
    for parameter in parameters:
        assert parameter.grad.dtype == torch.float32
        local[id(parameter)] = parameter.grad.clone()


def reduction_error(engine: TrainEngine, local: dict[int, torch.Tensor]) -> float:
    """Worst relative L2 distance of a reduced gradient to the plain fp32 mean; collective."""
    worst = 0.0
    for own in engine.engines:
        group = own.grid.get_data_parallel_group()
        for parameter in own.trained:
            mean = local[id(parameter)].clone()
            dist.all_reduce(mean, group=group)
            mean /= group.size()
            error = own.gradient(parameter).float().view_as(mean) - mean
            worst = max(worst, float(error.norm() / mean.norm().clamp(min=1e-6)))
    return worst


if __name__ == "__main__":
    main()
