"""Core attention for machines without Transformer Engine: PyTorch's SDPA, packed and unpacked.

Shape legend: S sequence, B batch, T packed tokens, N segments, L padded segment length, A query
heads, G key/value heads, D head dim.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class SegmentBucket:
    """Segments of similar length, as rows of one padded batch."""

    gather_NL: torch.Tensor
    """int64: token index of each padded place; padding repeats the segment's last token."""
    rows: torch.Tensor
    """int64: the flat (N*L) places that are real tokens, in token order."""


@dataclass
class SegmentedParams(PackedSeqParams):
    """Megatron-Core's packed-sequence parameters, with the index tables that SDPA needs (made once
    a micro-batch)."""

    buckets: list[SegmentBucket] = field(default_factory=list)
    inverse_T: torch.Tensor | None = None
    """int64: place of each token in the concatenation of all buckets' real rows."""


def segmented_params(
    cu_seqlens: torch.Tensor, *, max_seqlen: int, for_sdpa: bool
) -> SegmentedParams:
    """Describe one packed sequence to every attention layer.

    Args:
        cu_seqlens: int32 [n+1], from 0 to the sequence length.
        max_seqlen: Longest segment, never the packed total (Megatron-Core's RoPE would take it for
            one segment).
        for_sdpa: Also make the index tables of `SDPACoreAttention`.
    """
    params = SegmentedParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    if not for_sdpa:
        return params
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = ends - starts
    order = []
    # One padded batch for each power of two: at most half of a row is padding, whatever the mix of
    # lengths.
    size_class = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    for power in size_class.unique().tolist():
        chosen = (size_class == power).nonzero().flatten()
        width = int(lengths[chosen].max())
        if width == 0:
            continue
        column_L = torch.arange(width, device=cu_seqlens.device)
        real_NL = column_L[None] < lengths[chosen, None]
        place_NL = starts[chosen, None] + torch.minimum(
            column_L[None], (lengths[chosen, None] - 1).clamp(min=0)
        )
        rows = real_NL.flatten().nonzero().flatten()
        params.buckets.append(SegmentBucket(gather_NL=place_NL, rows=rows))
        order.append(place_NL.flatten()[rows])
    params.inverse_T = torch.cat(order).argsort()
    return params


class SDPACoreAttention(MegatronModule):
    """Causal grouped-query attention by `torch.nn.functional.scaled_dot_product_attention`.

    Takes the place of Transformer Engine's attention in a Megatron-Core layer spec. In the packed
    format each segment attends to itself alone: padded places lie behind a segment's last token,
    where causality hides them.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: SegmentedParams | None = None,
    ) -> torch.Tensor:
        """Attention output: [S, B, A*D], or [T, A*D] for packed input.

        Args:
            query: [S, B, A, D], or [T, A, D] when packed.
            key: [S, B, G, D], or [T, G, D].
            value: as `key`.
            attention_mask: Must be None; the mask is causal.
            attention_bias: Must be None.
            packed_seq_params: Segments of a packed sequence.
        """
        assert attention_mask is None and attention_bias is None, (
            "causal attention without extra masks only"
        )
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out_BASD = self._attend(q, k, v)
            return out_BASD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
        parts = []
        for bucket in packed_seq_params.buckets:
            q, k, v = (x[bucket.gather_NL].transpose(1, 2) for x in (query, key, value))
            out_NLAD = self._attend(q, k, v).transpose(1, 2)
            parts.append(out_NLAD.flatten(0, 1)[bucket.rows])
        out_TAD = torch.cat(parts)[packed_seq_params.inverse_T]
        return out_TAD.flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
