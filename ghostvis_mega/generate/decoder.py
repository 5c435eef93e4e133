"""The language model for inference: fused matrices, a static cache of keys and values, no autograd.

Plain PyTorch but for what `kernels` provides; the same mathematics as `model.llm` in one process or
over tensor-parallel ranks.

Shape legend: N tokens of a call, B prompts, S padded prompt length, R rows of the cache, T
positions of a row, H hidden, G key/value heads and M query heads of each of them (both of this
rank), D head dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ghostvis_mega.config.schema import LLMConfig
from ghostvis_mega.generate.kernels import Kernels, TorchKernels, rotate, split_qkv
from ghostvis_mega.generate.ranks import Alone, Ranks
from ghostvis_mega.model.shards import shard
from ghostvis_mega.utils.errors import CheckpointError

Read = Callable[[str], torch.Tensor]
"""A parameter, whole, on the CPU, by our name for it."""


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, cut to this rank."""

    attention_norm_H: torch.Tensor
    qkv_weight: torch.Tensor
    """[G * (M + 2) * D, H]: of each key/value head its queries, its key, its value."""
    qkv_bias: torch.Tensor | None
    out_weight: torch.Tensor
    mlp_norm_H: torch.Tensor
    up_weight: torch.Tensor
    """Gate over up; without a gate just up."""
    down_weight: torch.Tensor


@dataclass
class KVCache:
    """Keys and values of R rows: [layers, R, G, T, D] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def rows(self, count: int) -> "KVCache":
        """The first rows, the same memory."""
        return KVCache(self.keys[:, :count], self.values[:, :count])

    def copy_row(self, source: int, targets: list[int], length: int) -> None:
        """Give other rows the first `length` positions of one."""
        for cache in (self.keys, self.values):
            cache[:, targets, :, :length] = cache[:, source : source + 1, :, :length]


def check_ranks(llm: LLMConfig, size: int) -> None:
    """Raise where so many ranks cannot share a model.

    Raises:
        CheckpointError: Names the field that they do not divide.
    """
    for field in ("num_kv_heads", "ffn_hidden_size"):
        if getattr(llm, field) % size:
            raise CheckpointError(
                f"--tensor {size} does not divide model.llm.{field}={getattr(llm, field)}: use "
                "fewer ranks"
            )


class Decoder:
    """A language model.

    Args:
        llm: Its settings.
        read: Parameters by our names, whole, on the CPU.
        device: Where it computes.
        dtype: What it computes in.
        ranks: The ranks that share it.
        kernels: Implementations of what a decoding step is made of.

    Raises:
        CheckpointError: The heads cannot be shared out among so many ranks.
    """

    def __init__(
        self,
        llm: LLMConfig,
        read: Read,
        *,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        kernels: Kernels | None = None,
    ):
        self.llm, self.device, self.dtype = llm, device, dtype
        self.ranks: Ranks = ranks or Alone()
        self.kernels: Kernels = kernels or TorchKernels()
        check_ranks(llm, self.ranks.size)
        self.num_groups = llm.num_kv_heads // self.ranks.size
        self.queries = llm.num_heads // llm.num_kv_heads
        self.embedding_VH = self._vocabulary(read("embedding.weight"))
        self.head_VH = (
            self.embedding_VH if llm.tied_embeddings else self._vocabulary(read("head.weight"))
        )
        self.layers = [self._layer(read, index) for index in range(llm.num_layers)]
        self.final_norm_H = self._weight(read, "decoder.final_layernorm.weight")
        half = torch.arange(0, llm.head_dim, 2, dtype=torch.float32)
        self._frequencies = (1.0 / llm.rope_base ** (half / llm.head_dim)).to(device)
        self.rotary_TD = torch.empty(0, llm.head_dim, device=device)

    def _weight(self, read: Read, name: str) -> torch.Tensor:
        gated = self.llm.activation == "swiglu"
        own = shard(read(name), name, size=self.ranks.size, rank=self.ranks.rank, gated=gated)
        return own.to(device=self.device, dtype=self.dtype).contiguous()

    def _vocabulary(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's rows; zeros fill up a vocabulary that the ranks do not divide."""
        each = -(-full.shape[0] // self.ranks.size)
        own = full[each * self.ranks.rank :][:each]
        own = F.pad(own, (0, 0, 0, each - own.shape[0]))
        return own.to(device=self.device, dtype=self.dtype).contiguous()

    def _layer(self, read: Read, index: int) -> Layer:
        name = f"decoder.layers.{index}."
        biased = self.llm.qkv_bias
        return Layer(
            attention_norm_H=self._weight(read, f"{name}input_layernorm.weight"),
            qkv_weight=self._weight(read, f"{name}self_attention.linear_qkv.weight"),
            qkv_bias=self._weight(read, f"{name}self_attention.linear_qkv.bias")
            if biased
            else None,
            out_weight=self._weight(read, f"{name}self_attention.linear_proj.weight"),
            mlp_norm_H=self._weight(read, f"{name}pre_mlp_layernorm.weight"),
            up_weight=self._weight(read, f"{name}mlp.linear_fc1.weight"),
            down_weight=self._weight(read, f"{name}mlp.linear_fc2.weight"),
        )

    @property
    def num_bytes(self) -> int:
        """Of this rank's weights that a step reads whole."""
        parts = [getattr(layer, f.name) for layer in self.layers for f in fields(layer)]
        held = [*parts, self.final_norm_H, self.head_VH]
        return sum(part.numel() * part.element_size() for part in held if part is not None)

    def cache(self, rows: int, length: int) -> KVCache:
        """An empty cache of `rows` rows with `length` positions each."""
        shape = (len(self.layers), rows, self.num_groups, length, self.llm.head_dim)
        if length > len(self.rotary_TD):
            positions = torch.arange(length, device=self.device, dtype=torch.float32)
            angles = torch.outer(positions, self._frequencies)
            self.rotary_TD = torch.cat((angles.cos(), angles.sin()), dim=-1)
        zeros = torch.zeros(2, *shape, dtype=self.dtype, device=self.device)
        return KVCache(zeros[0], zeros[1])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., H] of token ids [...]."""
        if self.ranks.size == 1:
            return F.embedding(tokens, self.embedding_VH)
        own = tokens - self.ranks.rank * self.embedding_VH.shape[0]
        here = (own >= 0) & (own < self.embedding_VH.shape[0])
        found = F.embedding(own.masked_fill(~here, 0), self.embedding_VH) * here.unsqueeze(-1)
        return self.ranks.add(found)

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """fp32 scores [N, V] of hidden states as `prefill` and `step` leave them."""
        part_NV = self.kernels.linear(hidden_NH, self.head_VH, None)
        return self.ranks.join(part_NV)[:, : self.llm.vocab_size].float()

    def prefill(
        self, hidden_BSH: torch.Tensor, cache: KVCache, rows: list[int] | None
    ) -> torch.Tensor:
        """Run whole prompts, which begin at position 0; what follows a shorter one is padding.

        Padding stands behind its prompt, so causal attention never looks at it; the cache keeps it
        until decoding writes over it.

        Args:
            hidden_BSH: Embeddings.
            cache: Takes keys and values.
            rows: Rows of the cache, one a prompt; None: the first ones.

        Returns:
            Final hidden states [B, S, H].
        """
        count, length, _ = hidden_BSH.shape
        # One tensor for all layers: a list would be sent to the device by each of them.
        places = torch.tensor(range(count) if rows is None else rows, device=self.device)

        rotary_ND = self.rotary_TD[:length].repeat(count, 1)

        def attend(index: int, qkv_NX: torch.Tensor) -> torch.Tensor:
            q, k, v = self._rotated(qkv_NX, rotary_ND)
            q_BASD = q.unflatten(0, (count, length)).flatten(2, 3).transpose(1, 2)
            k_BGSD, v_BGSD = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (k, v))
            cache.keys[index][places, :, :length] = k_BGSD
            cache.values[index][places, :, :length] = v_BGSD
            out_BASD = F.scaled_dot_product_attention(
                q_BASD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=self.queries > 1
            )
            return out_BASD.transpose(1, 2).flatten(0, 1).flatten(1)

        hidden_NH = self._run(hidden_BSH.flatten(0, 1), attend, TorchKernels())
        return hidden_NH.unflatten(0, (count, length))

    def step(self, tokens_R: torch.Tensor, lengths_R: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """One token for each row: fp32 scores [R, V] of what follows it.

        Args:
            tokens_R: int64.
            lengths_R: int64, positions that a row has already: where its token goes.
            cache: Of at least R rows.
        """
        shape = (self.num_groups, self.queries, self.llm.head_dim)

        def attend(index: int, qkv_RX: torch.Tensor) -> torch.Tensor:
            keys, values = cache.keys[index], cache.values[index]
            return self.kernels.attend(qkv_RX, shape, self.rotary_TD, lengths_R, keys, values)

        return self.logits(self._run(self.embed(tokens_R), attend, self.kernels))

    def _rotated(
        self, qkv_NX: torch.Tensor, rotary_ND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [N, G, M, D], keys and values [N, G, D] of a fused projection, at positions."""
        q, k, v = split_qkv(qkv_NX, (self.num_groups, self.queries, self.llm.head_dim))
        return rotate(q, rotary_ND[:, None, None]), rotate(k, rotary_ND[:, None]), v

    def _run(
        self,
        hidden_NH: torch.Tensor,
        attend: Callable[[int, torch.Tensor], torch.Tensor],
        kernels: Kernels,
    ) -> torch.Tensor:
        """All layers and the final norm; `attend` turns a layer's fused projection into heads."""
        eps = self.llm.norm_eps
        change: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            hidden_NH, x = kernels.add_norm(hidden_NH, change, layer.attention_norm_H, eps)
            heads = attend(index, kernels.linear(x, layer.qkv_weight, layer.qkv_bias))
            change = self.ranks.add(kernels.linear(heads, layer.out_weight, None))
            hidden_NH, x = kernels.add_norm(hidden_NH, change, layer.mlp_norm_H, eps)
            x = kernels.linear(x, layer.up_weight, None)
            x = kernels.activate(x, self.llm.activation)
            change = self.ranks.add(kernels.linear(x, layer.down_weight, None))
        return kernels.add_norm(hidden_NH, change, self.final_norm_H, eps)[1]
