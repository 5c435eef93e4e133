"""Gradients of embedding and head that go straight into `main_grad`, against plain autograd."""

import os
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.model import embedding as embedding_module
from ghostvis_mega.model.embedding import add_rows_
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import (
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    llm_config,
    make_llm,
    make_pack,
    make_rows,
    to_input,
)

GRAD = 0.125
"""What the loss is multiplied by before its backward."""
CHANGED = {"tied": {"tied_embeddings": True}, "untied": {"tied_embeddings": False}}


def pack() -> MicroBatch:
    """Few kinds of tokens, so that each comes often; a picture in the middle sample."""
    generator = torch.Generator().manual_seed(5)
    samples = [torch.randint(6, 20, (length,), generator=generator) for length in (9, 14, 6)]
    samples[1][4 : 4 + TOKENS_PER_IMAGE] = IMAGE_TOKEN
    return make_pack(samples, pictures={1: 4})


def rows() -> MicroBatch:
    generator = torch.Generator().manual_seed(6)
    return make_rows(torch.randint(6, 20, (3, 8), generator=generator), torch.ones(3, 8))


Gradients = dict[str, torch.Tensor]


def gradients(chunk: LLMChunk, batch: MicroBatch, *, straight: bool) -> Gradients:
    """Of two micro-batches, the second as the first, by parameter; and of the picture."""
    generator = torch.Generator().manual_seed(7)
    vision_nH = None
    if batch.images:
        vision_nH = torch.randn(TOKENS_PER_IMAGE, chunk.llm.hidden_size, generator=generator)
        vision_nH.requires_grad_()
    named = dict(chunk.named_parameters())
    for name, parameter in named.items():
        parameter.grad = torch.zeros_like(parameter)
        if straight and ("embedding" in name or "head" in name):
            parameter.main_grad = parameter.grad
    for _ in range(2):
        inputs = to_input(batch)
        hidden_SBH = chunk(inputs, vision_nH)
        expected = GRAD if straight else None
        (chunk.loss_sum(hidden_SBH, inputs, expected_grad=expected) * GRAD).backward()
    found = {name: parameter.grad for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = None
        if hasattr(parameter, "main_grad"):
            del parameter.main_grad
    return found if vision_nH is None else found | {"picture": vision_nH.grad}


def worst(one: Gradients, other: Gradients) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in one)


@pytest.mark.parametrize("make", [pack, rows])
@pytest.mark.parametrize("changed", CHANGED)
def test_they_are_those_of_autograd(
    groups: Groups, changed: str, make: Callable[[], MicroBatch]
) -> None:
    llm, batch = llm_config(**CHANGED[changed]), make()
    truth = gradients(make_llm(llm, groups), batch, straight=False)
    ours = make_llm(llm, groups, fused_loss=True)
    with mock.patch.object(embedding_module, "add_rows_", wraps=add_rows_) as added:
        assert worst(gradients(ours, batch, straight=True), truth) <= 2e-6
    assert added.call_count == 2


def test_what_is_lost_would_be_seen(groups: Groups) -> None:
    llm, batch = llm_config(), pack()
    truth = gradients(make_llm(llm, groups), batch, straight=False)

    def first_alone(out: torch.Tensor, at: torch.Tensor, change: torch.Tensor) -> None:
        out[at[at >= 0]] += change[at >= 0]

    def neighbour(out: torch.Tensor, at: torch.Tensor, change: torch.Tensor) -> None:
        add_rows_(out, at.roll(1), change)

    for broken in (first_alone, neighbour):
        with mock.patch.object(embedding_module, "add_rows_", broken):
            ours = make_llm(llm, groups, fused_loss=True)
            assert worst(gradients(ours, batch, straight=True), truth) > 1e-2


def test_a_loss_that_gets_another_gradient_is_refused(groups: Groups) -> None:
    chunk, inputs = make_llm(llm_config(), groups, fused_loss=True), to_input(rows())
    loss = chunk.loss_sum(chunk(inputs, None), inputs, expected_grad=GRAD)
    with pytest.raises(RuntimeError, match="the loss was to get the gradient 0.125"):
        (loss * 2 * GRAD).backward()


def test_rows_of_other_ranks_and_of_pictures_add_nothing() -> None:
    out_VH = torch.ones(4, 3)
    at_n = torch.tensor([2, -1, 2, 0, -1])
    rows_nH = torch.arange(15.0).view(5, 3).to(torch.bfloat16)
    add_rows_(out_VH, at_n, rows_nH)
    assert out_VH.tolist() == [[10, 11, 12], [1, 1, 1], [7, 9, 11], [1, 1, 1]]


COMPARE = """
import torch
from ghostvis_mega.model.embedding import add_rows_
from ghostvis_mega.model.triton_kernels import add_rows

generator = torch.Generator().manual_seed(0)
for count, width, most in ((1, 7, 1), (300, 600, 5), (64, 512, 64), (200, 1030, 2)):
    for dtype in (torch.float32, torch.bfloat16):
        at = torch.randint(-1, most, (count,), generator=generator)
        rows = torch.randn(count, width, generator=generator).to(dtype)
        ours = torch.randn(most, width, generator=generator)
        theirs = ours.clone()
        add_rows(ours, at, rows)
        add_rows_(theirs, at, rows)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
none = torch.full((5,), -1)
before = ours.clone()
add_rows(ours, none, rows[:5])
assert torch.equal(ours, before)
print("compared")
"""


def test_the_kernel_adds_what_pytorch_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.endswith("compared\n"), done.stdout + done.stderr


@pytest.mark.parametrize("rows_type", ["*bf16", "*fp32"])
def test_the_kernel_compiles_for_a_hopper_gpu(rows_type: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ghostvis_mega.model import triton_kernels

    source = ASTSource(
        triton_kernels.add_rows_kernel,
        {
            "ids": "*i64",
            "order": "*i64",
            "ends": "*i64",
            "rows": rows_type,
            "out": "*fp32",
            "width": "i32",
            "BLOCK": "constexpr",
        },
        constexprs={"BLOCK": triton_kernels._ROW_BLOCK},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
    assert ".local" not in compiled.asm["ptx"]
