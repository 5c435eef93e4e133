"""Self-attention that splits the mixed QKV and rotates queries and keys in one operation.

Megatron-Core splits first and then rotates queries and keys each by a kernel of its own, with
copies around them; it can do all at once, but not for packed sequences. Given the angle of each row
the same kernel serves these too: a pack is one sequence whose positions start again now and then.

Shape legend: S this rank's rows of the sequence, B batch, G key/value heads, A query heads (of this
tensor rank), D head width, X what one key/value head has in the mixed QKV: its queries, key and
value.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention

Angles = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""fp32 [S, 1, 1, D], one row for each row of the activations; a pair: of queries and of keys."""

KERNEL_ELEMENTS = 2**31
"""Transformer Engine's kernel counts elements with 32 bits."""


class FusedRotarySelfAttention(SelfAttention):
    """Megatron-Core's self-attention, which is handed queries and keys that are rotated already."""

    _angles: Angles | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: Angles,
        **rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; arguments and result as Megatron-Core's, but for the angles.

        Args:
            hidden_states: [S, B, H], S cut between tensor ranks with sequence parallelism.
            attention_mask: None; the mask is causal.
            rotary_pos_emb: Angles of the rows that this context-parallel rank has, packed or not.
            rest: Further arguments of Megatron-Core.
        """
        # Megatron-Core calls the method below without the angles.
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **rest)
        finally:
            self._angles = None

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [S, B, A, D], rotated keys and plain values [S, B, G, D]."""
        assert split_qkv and not output_gate, "Megatron-Core asks for what our models do not have"
        assert self.q_layernorm is None and self.k_layernorm is None, "norms come before rotation"
        assert self._angles is not None, "called by forward alone"
        pair = self._angles if isinstance(self._angles, tuple) else (self._angles, self._angles)
        mixed_SBGX, widths = super().get_query_key_value_tensors(
            hidden_states, key_value_states, split_qkv=False
        )
        return split_and_rotate(mixed_SBGX, *pair, widths=widths)


def split_and_rotate(
    mixed_SBGX: torch.Tensor, q_angles: torch.Tensor, k_angles: torch.Tensor, *, widths: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries [S, B, A, D], rotated keys and plain values [S, B, G, D].

    Args:
        mixed_SBGX: For each key/value head its queries, its key and its value.
        q_angles: fp32 [S, 1, 1, D], of queries.
        k_angles: The same, of keys.
        widths: How X divides into queries, key and value.
    """
    # Transformer Engine does not check the number of rows and would read behind the last one.
    rows = (mixed_SBGX.shape[0], 1, 1, widths[1])
    assert q_angles.shape == k_angles.shape == rows, "one row of angles for each row of activations"
    if mixed_SBGX.is_cuda and mixed_SBGX.numel() < KERNEL_ELEMENTS:
        from transformer_engine.pytorch.attention.rope import apply_fused_qkv_rotary_pos_emb

        return apply_fused_qkv_rotary_pos_emb(mixed_SBGX, q_angles, k_angles, widths)
    return split_and_rotate_plain(mixed_SBGX, q_angles, k_angles, widths=widths)


def split_and_rotate_plain(
    mixed_SBGX: torch.Tensor, q_angles: torch.Tensor, k_angles: torch.Tensor, *, widths: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`split_and_rotate` by PyTorch's operations, on any device."""
    query, key, value = mixed_SBGX.split(widths, dim=-1)
    query_SBAD = query.unflatten(-1, (-1, widths[1])).flatten(2, 3)
    return rotate(query_SBAD, q_angles), rotate(key, k_angles), value


def rotate(x_SBAD: torch.Tensor, angles_S11D: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]), in fp32, as Transformer Engine's kernel does."""
    x = x_SBAD.float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * angles_S11D.cos() + turned * angles_S11D.sin()).to(x_SBAD.dtype)
