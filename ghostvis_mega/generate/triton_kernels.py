"""What a decoding step is made of, fused for GPUs.

One token a row means matrices times vectors: time goes to reading weights once and to the number of
kernels. Attention reads the live part of the cache alone, however long the rows are that hold it,
and is spread over splits of a row so that one row fills the GPU.

Shape legend: R rows, G key/value heads, M query heads of each, D head dim, H hidden, F MLP width.
"""

import torch
import triton
import triton.language as tl

from ghostvis_mega.generate.kernels import Heads, TorchKernels

_BLOCK = 32
"""Positions that attention looks at in one go."""
_LEAST_DOT = 16
"""Rows and columns that the tensor cores want at least."""
_MOST_SPLITS = 32
_PROGRAMS = 256
"""Attention is split until about so many programs run."""


@triton.jit
def add_norm_kernel(
    hidden, change, weight, out_hidden, out, size, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row [H]: the sum, rounded as it is kept, and its RMSNorm."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(hidden + row * size + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(change + row * size + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(out_hidden.dtype.element_ty)
        tl.store(out_hidden + row * size + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, (x * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(x, out, size, BLOCK: tl.constexpr):
    """A block of one row: gate [F] and up [F] side by side."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(x + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def place_kernel(
    qkv,
    rotary,
    lengths,
    queries,
    keys,
    values,
    row_stride,
    group_stride,
    M: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One group of one row: rotate queries and key, put key and value into the cache."""
    row, group = tl.program_id(0), tl.program_id(1)
    number = row * tl.num_programs(1) + group
    position = tl.load(lengths + row)
    half = tl.arange(0, HALF)
    cos = tl.load(rotary + position * 2 * HALF + half)[None, :]
    sin = tl.load(rotary + position * 2 * HALF + HALF + half)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    source = qkv + number * (M + 2) * 2 * HALF
    places = head * 2 * HALF + half[None, :]
    first = tl.load(source + places, mask=head <= M, other=0.0).to(tl.float32)
    second = tl.load(source + places + HALF, mask=head <= M, other=0.0).to(tl.float32)
    low = (first * cos - second * sin).to(keys.dtype.element_ty)
    high = (second * cos + first * sin).to(keys.dtype.element_ty)
    target = queries + number * M * 2 * HALF
    tl.store(target + places, low, mask=head < M)
    tl.store(target + places + HALF, high, mask=head < M)
    offset = row.to(tl.int64) * row_stride + group * group_stride + position * 2 * HALF
    # The key stands behind the group's queries.
    key = keys + offset - M * 2 * HALF
    tl.store(key + places, low, mask=head == M)
    tl.store(key + places + HALF, high, mask=head == M)
    whole = tl.arange(0, 2 * HALF)
    tl.store(values + offset + whole, tl.load(source + (M + 1) * 2 * HALF + whole))


@triton.jit
def attend_kernel(
    queries,
    keys,
    values,
    lengths,
    partial,
    best_out,
    total_out,
    row_stride,
    group_stride,
    groups,
    scale,
    M: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of one row over one split of its positions: an unfinished softmax."""
    number, split = tl.program_id(0), tl.program_id(1)
    row, group = number // groups, number % groups
    length = tl.load(lengths + row).to(tl.int32) + 1
    chunk = tl.cdiv(length, SPLITS * BLOCK) * BLOCK
    start = split * chunk
    end = tl.minimum(start + chunk, length)
    head = tl.arange(0, HEADS)
    d = tl.arange(0, D)
    here = head[:, None] < M
    q = tl.load(queries + (number * M + head[:, None]) * D + d[None, :], mask=here, other=0.0)
    best = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((HEADS,), dtype=tl.float32)
    sums = tl.zeros((HEADS, D), dtype=tl.float32)
    offset = row.to(tl.int64) * row_stride + group * group_stride
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        inside = t < end
        places = offset + t[:, None] * D + d[None, :]
        k = tl.load(keys + places, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        v = tl.load(values + places, mask=inside[:, None], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, axis=1)
        best = higher
    place = (number * SPLITS + split) * M + head
    tl.store(partial + place[:, None] * D + d[None, :], sums, mask=here)
    tl.store(best_out + place, best, mask=head < M)
    tl.store(total_out + place, total, mask=head < M)


@triton.jit
def combine_kernel(
    partial,
    best_in,
    total_in,
    out,
    M: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One head of one row: finish the softmax over its splits."""
    number, head = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    place = (number * SPLITS + split) * M + head
    best = tl.load(best_in + place)
    # Splits behind the end of a row have -inf, the first one never.
    share = tl.exp(best - tl.max(best, axis=0))
    total = tl.sum(tl.load(total_in + place) * share, axis=0)
    sums = tl.load(partial + place[:, None] * D + d[None, :])
    y = tl.sum(sums * share[:, None], axis=0) / total
    tl.store(out + (number * M + head) * D + d, y.to(out.dtype.element_ty))


def _power(count: int) -> int:
    return triton.next_power_of_2(count)


class TritonKernels(TorchKernels):
    """Fused kernels for the steps of decoding; head dims are powers of two from 16 on.

    Matrix products stay the library's, which reads weights as fast as a kernel of ours did.
    """

    def add_norm(
        self, hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of residual stream and change, and its norm, in one kernel."""
        count, size = hidden.shape
        out = torch.empty_like(hidden)
        kept = hidden if change is None else torch.empty_like(hidden)
        add_norm_kernel[(count,)](
            hidden,
            hidden if change is None else change,
            weight,
            kept,
            out,
            size,
            eps,
            ADDS=change is not None,
            BLOCK=_power(size),
            num_warps=8,
        )
        return kept, out

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """SwiGLU in one kernel; squared ReLU as PyTorch does it."""
        if activation != "swiglu":
            return super().activate(x, activation)
        count, size = x.shape[0], x.shape[1] // 2
        out = x.new_empty(count, size)
        swiglu_kernel[(count, triton.cdiv(size, 1024))](x, out, size, BLOCK=1024, num_warps=4)
        return out

    def attend(
        self,
        qkv_RX: torch.Tensor,
        heads: Heads,
        rotary_TD: torch.Tensor,
        lengths_R: torch.Tensor,
        keys_RGTD: torch.Tensor,
        values_RGTD: torch.Tensor,
    ) -> torch.Tensor:
        """Place the token, attend in splits, combine."""
        count = len(qkv_RX)
        groups, queries, size = heads
        strides = (keys_RGTD.stride(0), keys_RGTD.stride(1))
        q = qkv_RX.new_empty(count, groups, queries, size)
        place_kernel[(count, groups)](
            qkv_RX,
            rotary_TD,
            lengths_R,
            q,
            keys_RGTD,
            values_RGTD,
            *strides,
            M=queries,
            HEADS=_power(queries + 1),
            HALF=size // 2,
            num_warps=2,
        )
        splits = min(_MOST_SPLITS, _power(max(1, _PROGRAMS // (count * groups))))
        shape = (count * groups, splits, queries)
        partial = torch.empty(*shape, size, dtype=torch.float32, device=q.device)
        best = torch.empty(shape, dtype=torch.float32, device=q.device)
        total = torch.empty_like(best)
        attend_kernel[(count * groups, splits)](
            q,
            keys_RGTD,
            values_RGTD,
            lengths_R,
            partial,
            best,
            total,
            *strides,
            groups,
            size**-0.5,
            M=queries,
            HEADS=max(_LEAST_DOT, _power(queries)),
            D=size,
            SPLITS=splits,
            BLOCK=_BLOCK,
            num_warps=2,
        )
        out = qkv_RX.new_empty(count, groups * queries * size)
        combine_kernel[(count * groups, queries)](
            partial, best, total, out, M=queries, D=size, SPLITS=splits, num_warps=2
        )
        return out
