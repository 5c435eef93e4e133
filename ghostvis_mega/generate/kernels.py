"""What a layer is made of between its matrices, in plain PyTorch; the reference of all others.

Shape legend: N tokens (in a decoding step one a row, R), T positions of a cache's row, H hidden, G
key/value heads, M query heads of each, D head dim.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

Heads = tuple[int, int, int]
"""(G, M, D)."""


class Kernels(Protocol):
    """Implementations that `Decoder` can be given."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """[N, in] -> [N, out]."""
        ...

    def add_norm(
        self, hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum [N, H] of the residual stream and what a layer adds, and its RMSNorm."""
        ...

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """[N, 2 F] -> [N, F] for `swiglu`, else [N, F] -> [N, F]."""
        ...

    def attend(
        self,
        qkv_RX: torch.Tensor,
        heads: Heads,
        rotary_TD: torch.Tensor,
        lengths_R: torch.Tensor,
        keys_RGTD: torch.Tensor,
        values_RGTD: torch.Tensor,
    ) -> torch.Tensor:
        """Put one token a row into the cache at `lengths_R` and look at all up to it: [R, G M D].

        Args:
            qkv_RX: Fused projection of the tokens.
            heads: Its shape.
            rotary_TD: Cosines, then sines, of each position, fp32.
            lengths_R: int64.
            keys_RGTD: Cache of one layer; at least R rows.
            values_RGTD: Likewise.
        """
        ...


def split_qkv(qkv_NX: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """Queries [N, G, M, D], keys and values [N, G, D]."""
    groups, queries, size = heads
    qkv = qkv_NX.unflatten(1, (groups, queries + 2, size))
    return qkv[:, :, :queries], qkv[:, :, queries], qkv[:, :, queries + 1]


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotary positions on the last dimension; `rotary` holds cosines, then sines, and broadcasts.

    Angles are applied in the type of `x`, as training does.
    """
    cos, sin = rotary.to(x.dtype).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class TorchKernels:
    """PyTorch's own operations, on any device."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The library's matrix product."""
        return F.linear(x, weight, bias)

    def add_norm(
        self, hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two operations."""
        if change is not None:
            hidden = hidden + change
        return hidden, F.rms_norm(hidden, weight.shape, weight, eps)

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """SwiGLU or squared ReLU."""
        if activation == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.relu(x).square()

    def attend(
        self,
        qkv_RX: torch.Tensor,
        heads: Heads,
        rotary_TD: torch.Tensor,
        lengths_R: torch.Tensor,
        keys_RGTD: torch.Tensor,
        values_RGTD: torch.Tensor,
    ) -> torch.Tensor:
        """The queries of a group stand where others have a sequence: no head is copied."""
        q, k, v = split_qkv(qkv_RX, heads)
        rotary_RD = rotary_TD[lengths_R]
        count, longest = len(qkv_RX), keys_RGTD.shape[2]
        rows = torch.arange(count, device=qkv_RX.device)
        keys_RGTD[rows, :, lengths_R] = rotate(k, rotary_RD[:, None])
        values_RGTD[rows, :, lengths_R] = v
        if qkv_RX.device.type == "cpu":
            longest = int(lengths_R.max()) + 1
        seen_RT = torch.arange(longest, device=qkv_RX.device) <= lengths_R[:, None]
        out_RGMD = F.scaled_dot_product_attention(
            rotate(q, rotary_RD[:, None, None]),
            keys_RGTD[:count, :, :longest],
            values_RGTD[:count, :, :longest],
            attn_mask=seen_RT[:, None, None],
        )
        return out_RGMD.flatten(1)
