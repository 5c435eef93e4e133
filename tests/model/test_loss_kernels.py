"""The loss's fused kernels: equal to PyTorch's in Triton's interpreter, and code for a Hopper
GPU."""

import os
import subprocess
import sys

import pytest
import torch

from ghostvis_mega.model.loss_kernels import TorchLossKernels

COMPARE = """
import torch
from ghostvis_mega.model.loss_kernels import TorchLossKernels
from ghostvis_mega.model.triton_kernels import TritonLossKernels

ours, theirs = TritonLossKernels(), TorchLossKernels()
generator = torch.Generator().manual_seed(0)
worst = {}

def note(name, one, other):
    finite = other.isfinite()
    assert torch.equal(one[~finite], other[~finite]), name
    error = (one[finite].double() - other[finite].double()).norm() / other[finite].double().norm()
    worst[name] = max(worst.get(name, 0.0), float(error))

def both(dtype, width, columns):
    # A block and a part of one, a whole number of blocks, all padding; labels of other ranks.
    scores = (torch.randn(5, width, generator=generator) * 4).to(dtype)
    scores[1, columns // 2] = 60.0
    scores[:, columns:] = 90.0
    labels = torch.tensor([0, columns - 1, columns // 3, -7, width + 3])
    pair = [kernels.statistics(scores, labels, columns=columns) for kernels in (ours, theirs)]
    for part, name in enumerate(("peak", "sum", "score")):
        note(f"{name}", pair[0][:, part], pair[1][:, part])
    peaks, weights = pair[1][:, 0] + 0.5, torch.rand(5, generator=generator)
    shares = weights / (pair[1][:, 1] + 1.0)
    if columns == 0:
        peaks, shares = torch.zeros(5), torch.ones(5)
    changed = []
    for kernels in (ours, theirs):
        changed.append(scores.clone())
        kernels.gradient_(changed[-1], labels, peaks_R=peaks, shares_R=shares, weights_R=weights,
                          columns=columns)
    assert not changed[0][:, columns:].any()
    if columns:
        note(f"gradient {dtype}", changed[0].float(), changed[1].float())
        # A label one place further is a difference.
        other = scores.clone()
        theirs.gradient_(other, labels + 1, peaks_R=peaks, shares_R=shares, weights_R=weights,
                         columns=columns)
        assert (other.float() - changed[0].float()).norm() > 0.1 * changed[0].float().norm()

for dtype in (torch.float32, torch.bfloat16):
    for width, columns in ((5000, 5000), (8192, 8192), (38016, 37990), (64, 0), (200, 1)):
        both(dtype, width, columns)
spoiled = torch.randn(2, 6000, generator=generator)
spoiled[0, 17], spoiled[1, 5999] = float("nan"), float("inf")
for kernels in (ours, theirs):
    assert kernels.statistics(spoiled, torch.zeros(2).long(), columns=6000)[:, 1].isnan().all()
print(worst)
# The interpreter cuts numbers off where a GPU rounds them to BF16.
for name, error in worst.items():
    assert error <= (8e-3 if "bfloat16" in name else 1e-6), name
print("compared")
"""


def test_the_fused_kernels_compute_what_pytorch_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.endswith("compared\n"), done.stdout + done.stderr


KERNELS = {
    "statistics_kernel": {"labels": "*i64", "out": "*fp32"},
    "gradient_kernel": {
        "labels": "*i64",
        "peaks": "*fp32",
        "shares": "*fp32",
        "weights": "*fp32",
    },
}


@pytest.mark.parametrize("scores", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_fused_kernels_compile_for_a_hopper_gpu(name: str, scores: str) -> None:
    """The interpreter takes what the compiler refuses; ptxas runs without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ghostvis_mega.model import triton_kernels

    sizes = {"width": "i32", "columns": "i32", "BLOCK": "constexpr"}
    source = ASTSource(
        getattr(triton_kernels, name),
        {"logits": scores, **KERNELS[name], **sizes},
        constexprs={"BLOCK": triton_kernels._BLOCK},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 1000
    # No spills: what a thread holds stays in registers.
    assert ".local" not in compiled.asm["ptx"]


def test_the_reference_statistics_are_those_of_softmax() -> None:
    scores = torch.randn(30, 150_000, generator=torch.Generator().manual_seed(3)) * 5
    labels = torch.arange(30) * 4999
    peak, total, own = TorchLossKernels().statistics(scores, labels, columns=150_000).unbind(1)
    truth = torch.nn.functional.cross_entropy(scores.double(), labels, reduction="none")
    torch.testing.assert_close((total.log() + peak - own).double(), truth, rtol=1e-6, atol=0.0)
