"""The fused kernels: equal to PyTorch's in Triton's interpreter, and real code for a Hopper GPU."""

import os
import subprocess
import sys

import pytest
import torch

from ghostvis_mega.generate.kernels import TorchKernels

COMPARE = """
import torch
from ghostvis_mega.generate.kernels import TorchKernels
from ghostvis_mega.generate.triton_kernels import TritonKernels

ours, theirs = TritonKernels(), TorchKernels()
generator = torch.Generator().manual_seed(0)

def random(*shape):
    return torch.randn(*shape, generator=generator)

def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

for rows in (1, 3):
    x, weight, change = random(rows, 96), random(96), random(rows, 96)
    for added in (None, change):
        for a, b in zip(ours.add_norm(x, added, weight, 1e-6),
                        theirs.add_norm(x, added, weight, 1e-6)):
            same(a, b)
    wide = random(rows, 2 * 1100)
    same(ours.activate(wide, "swiglu"), theirs.activate(wide, "swiglu"))
    same(ours.activate(x, "relu2"), theirs.activate(x, "relu2"))
    for groups, queries, size in ((2, 6, 32), (1, 7, 16)):
        rotary = torch.cat([random(80, size // 2).cos(), random(80, size // 2).sin()], dim=1)
        lengths = torch.tensor([0, 37, 79][:rows] if rows == 3 else [70])
        qkv = random(rows, groups * (queries + 2) * size)
        caches = [random(4, groups, 80, size) for _ in range(2)]
        copies = [cache.clone() for cache in caches]
        a = ours.attend(qkv, (groups, queries, size), rotary, lengths, *caches)
        b = theirs.attend(qkv, (groups, queries, size), rotary, lengths, *copies)
        same(a, b)
        for one, other in zip(caches, copies):
            same(one, other)
        # A look too far into the row is a difference.
        b = theirs.attend(qkv, (groups, queries, size), rotary, lengths - (lengths > 0).long(),
                          *copies)
        assert (a - b).abs().max() > 1e-3
print("compared")
"""


def test_the_fused_kernels_compute_what_pytorch_does():
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "compared", done.stderr[-3000:]


BF16 = "*bf16"
KERNELS = {
    "add_norm_kernel": (
        {
            "hidden": BF16,
            "change": BF16,
            "weight": BF16,
            "out_hidden": BF16,
            "out": BF16,
            "size": "i32",
            "eps": "fp32",
        },
        {"ADDS": True, "BLOCK": 2048},
    ),
    "swiglu_kernel": ({"x": BF16, "out": BF16, "size": "i32"}, {"BLOCK": 1024}),
    "place_kernel": (
        {
            "qkv": BF16,
            "rotary": "*fp32",
            "lengths": "*i64",
            "queries": BF16,
            "keys": BF16,
            "values": BF16,
            "row_stride": "i32",
            "group_stride": "i32",
        },
        {"M": 6, "HEADS": 8, "HALF": 64},
    ),
    "attend_kernel": (
        {
            "queries": BF16,
            "keys": BF16,
            "values": BF16,
            "lengths": "*i64",
            "partial": "*fp32",
            "best_out": "*fp32",
            "total_out": "*fp32",
            "row_stride": "i32",
            "group_stride": "i32",
            "groups": "i32",
            "scale": "fp32",
        },
        {"M": 6, "HEADS": 16, "D": 128, "SPLITS": 32, "BLOCK": 32},
    ),
    "combine_kernel": (
        {"partial": "*fp32", "best_in": "*fp32", "total_in": "*fp32", "out": BF16},
        {"M": 6, "D": 128, "SPLITS": 32},
    ),
}
"""Arguments with their types, and constants, of the 1.5B model."""


@pytest.mark.parametrize("name", KERNELS)
def test_the_fused_kernels_compile_for_a_hopper_gpu(name: str):
    """The interpreter takes what the compiler refuses; ptxas runs without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ghostvis_mega.generate import triton_kernels

    arguments, constants = KERNELS[name]
    signature = arguments | dict.fromkeys(constants, "constexpr")
    source = ASTSource(getattr(triton_kernels, name), signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
    assert compiled.metadata.shared < 100_000


def test_the_reference_attends_to_the_live_part_alone():
    """What lies behind a row's end, even no number, changes nothing."""
    kernels, heads = TorchKernels(), (2, 3, 8)
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 2 * 5 * 8, generator=generator)
    rotary = torch.randn(12, 8, generator=generator)
    lengths = torch.tensor([3, 6])
    keys, values = (torch.randn(2, 2, 12, 8, generator=generator) for _ in range(2))
    first = kernels.attend(qkv, heads, rotary, lengths, keys, values)
    keys[:, :, 7:], values[0, :, 4:7] = float("nan"), 1e6
    again = kernels.attend(qkv, heads, rotary, lengths, keys, values)
    torch.testing.assert_close(first, again)
