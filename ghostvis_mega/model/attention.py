"""Core attention for machines without Transformer Engine: PyTorch's SDPA, packed and unpacked.

Shape legend: S rows of the sequence on this rank, W all of them, B batch, T packed tokens, N
segments, L padded segment length, Q its part on this rank, A query heads, G key/value heads, D head
dim.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from ghostvis_mega.model.context import WHOLE, ContextSlice, gathered_places


@dataclass
class SegmentBucket:
    """Segments of similar length, as rows of one padded batch; padding repeats a segment's last
    token."""

    gather_NL: torch.Tensor
    """int64: where each key of a segment stands among all keys."""
    rows: torch.Tensor
    """int64: the flat places of the padded batch of queries that are real tokens, in order."""
    queries_NQ: torch.Tensor | None = None
    """int64: where each query of this rank stands among its queries; None without context
    parallelism, where queries stand as keys do."""
    mask_N1QL: torch.Tensor | None = None
    """bool: keys that each query sees; None: causal, query for key."""


@dataclass
class SegmentedParams(PackedSeqParams):
    """Megatron-Core's packed-sequence parameters, with the index tables that SDPA needs (made once
    a micro-batch)."""

    buckets: list[SegmentBucket] = field(default_factory=list)
    inverse_T: torch.Tensor | None = None
    """int64: place of each query in the concatenation of all buckets' real rows."""


def segmented_params(
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    for_sdpa: bool,
    context: ContextSlice = WHOLE,
) -> SegmentedParams:
    """Describe one packed sequence to every attention layer.

    Args:
        cu_seqlens: int32 [n+1], from 0 to the length of the whole sequence, also where each
            context-parallel rank has a part of it.
        max_seqlen: Longest segment, never the packed total (Megatron-Core's RoPE would take it for
            one segment).
        for_sdpa: Also make the index tables of `SDPACoreAttention`.
        context: The context-parallel rank whose queries the tables are for.
    """
    # Transformer Engine's ring wants both kinds; the same tensor says that no padding lies between
    # segments.
    padded = cu_seqlens if context.size > 1 else None
    params = SegmentedParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    if not for_sdpa:
        return params
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = ends - starts
    key_places = None
    if context.size > 1:
        key_places = torch.from_numpy(gathered_places(lengths.cpu(), size=context.size))
        key_places = key_places.to(cu_seqlens.device)
    order = []
    # One padded batch for each power of two: at most half of a row is padding, whatever the mix of
    # lengths.
    size_class = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    for power in size_class.unique().tolist():
        chosen = (size_class == power).nonzero().flatten()
        width = int(lengths[chosen].max())
        if width == 0:
            continue
        place_NL, real_NL = _padded_places(starts[chosen], lengths[chosen], width)
        if key_places is None:
            bucket = SegmentBucket(gather_NL=place_NL, rows=real_NL.flatten().nonzero().flatten())
        else:
            place_NL = key_places[place_NL]
            bucket = _context_bucket(place_NL, starts[chosen], lengths[chosen], context)
        params.buckets.append(bucket)
        queries_NQ = bucket.gather_NL if bucket.queries_NQ is None else bucket.queries_NQ
        order.append(queries_NQ.flatten()[bucket.rows])
    params.inverse_T = torch.cat(order).argsort()
    return params


def _padded_places(
    starts_N: torch.Tensor, lengths_N: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of each token of a padded batch of segments, and which of them are real: [N, width]."""
    column_L = torch.arange(width, device=starts_N.device)
    last_N1 = (lengths_N[:, None] - 1).clamp(min=0)
    return starts_N[:, None] + torch.minimum(column_L[None], last_N1), column_L < lengths_N[:, None]


def _context_bucket(
    key_places_NL: torch.Tensor, starts_N: torch.Tensor, lengths_N: torch.Tensor, ctx: ContextSlice
) -> SegmentBucket:
    """The bucket of one context-parallel rank: an early and a late chunk of each segment ask, all
    keys answer."""
    width = key_places_NL.shape[1]
    queries_NQ, real_NQ = _padded_places(
        starts_N // ctx.size, lengths_N // ctx.size, width // ctx.size
    )
    place_NQ = queries_NQ - starts_N[:, None] // ctx.size
    chunk_N1 = lengths_N[:, None] // (2 * ctx.size)
    late_NQ = place_NQ >= chunk_N1
    # From the place within the rank's part to the position within the segment.
    position_NQ = place_NQ + torch.where(
        late_NQ, (2 * ctx.size - 2 - ctx.rank) * chunk_N1, ctx.rank * chunk_N1
    )
    seen_NQL = torch.arange(width, device=starts_N.device) <= position_NQ[:, :, None]
    return SegmentBucket(
        gather_NL=key_places_NL,
        rows=real_NQ.flatten().nonzero().flatten(),
        queries_NQ=queries_NQ,
        mask_N1QL=seen_NQL[:, None],
    )


class SDPACoreAttention(MegatronModule):
    """Causal grouped-query attention by `torch.nn.functional.scaled_dot_product_attention`.

    Takes the place of Transformer Engine's attention in a Megatron-Core layer spec. In the packed
    format each segment attends to itself alone: padded places lie behind a segment's last token,
    where causality hides them. With context parallelism each rank fetches the keys and values of
    all ranks and answers its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self.context_group, self.context = None, WHOLE
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "context parallelism needs its process group"
            self.context_group = pg_collection.cp
            self.context = ContextSlice(self.context_group.size(), self.context_group.rank())

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
            query: [S, B, A, D], or [T, A, D] when packed: this context-parallel rank's rows.
            key: [S, B, G, D], or [T, G, D], of the same rows.
            value: as `key`.
            attention_mask: Must be None; the mask is causal.
            attention_bias: Must be None.
            packed_seq_params: Segments of a packed sequence.
        """
        assert attention_mask is None and attention_bias is None, (
            "causal attention without extra masks only"
        )
        mask_SW = None
        if self.context.size > 1:
            key, value = self.gather_context(key, value)
        if packed_seq_params is None:
            if self.context.size > 1:
                key, value, mask_SW = self._whole_rows(key, value)
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out_BASD = self._attend(q, k, v, mask_SW)
            return out_BASD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
        parts = []
        for bucket in packed_seq_params.buckets:
            asked = bucket.gather_NL if bucket.queries_NQ is None else bucket.queries_NQ
            q, k, v = (
                x[places].transpose(1, 2)
                for x, places in (
                    (query, asked),
                    (key, bucket.gather_NL),
                    (value, bucket.gather_NL),
                )
            )
            out_NQAD = self._attend(q, k, v, bucket.mask_N1QL).transpose(1, 2)
            parts.append(out_NQAD.flatten(0, 1)[bucket.rows])
        out_TAD = torch.cat(parts)[packed_seq_params.inverse_T]
        return out_TAD.flatten(1)

    def gather_context(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all context-parallel ranks, in rank order along the first dimension.

        The gradient of each goes back to the rank it came from, summed over all that used it.
        """
        both = mappings.gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), group=self.context_group
        )
        return both.split([key.shape[-1], value.shape[-1]], dim=-1)

    def _whole_rows(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unpacked keys and values in sequence order, and what this rank's queries see of them:
        bool [S, W]."""
        whole = [key.shape[0]]
        places = torch.from_numpy(gathered_places(whole, size=self.context.size)).to(key.device)
        rows_S = torch.from_numpy(self.context.rows(whole)).to(key.device)
        seen_SW = torch.arange(key.shape[0], device=key.device) <= rows_S[:, None]
        return key[places], value[places], seen_SW

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
