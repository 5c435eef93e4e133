"""The model of the transformers and naive peers: Qwen2ForCausalLM, and before it a vision encoder.

Shape legend: B rows, S positions, N pictures, T tokens an image, H LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from ghostvis_mega.config.schema import LLMConfig, RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.engine.build import build_encoder
from ghostvis_mega.engine.optimizer import parameter_groups

_IGNORED = -100
"""Label of a position without loss, in transformers."""


def qwen2_config(llm: LLMConfig, *, attention: str) -> Qwen2Config:
    """transformers' settings of our LLM.

    Args:
        llm: Our settings.
        attention: `eager` or `sdpa`.
    """
    return Qwen2Config(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.ffn_hidden_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        max_position_embeddings=llm.max_positions,
        rms_norm_eps=llm.norm_eps,
        initializer_range=llm.init_std,
        tie_word_embeddings=llm.tied_embeddings,
        rope_parameters={"rope_theta": llm.rope_base, "rope_type": "default"},
        use_cache=False,
        attn_implementation=attention,
    )


@dataclass(frozen=True)
class PlainInput:
    """One micro-batch as this model reads it, on its device."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    """int64; as transformers wants them: the token itself where its loss counts, else -100."""
    image_rows: torch.Tensor
    """int64: flat B*S positions that pictures fill, slot after slot."""
    pixels_N3hw: torch.Tensor | None
    """uint8, one a slot."""


def plain_input(
    batch: MicroBatch,
    pictures: dict[int, torch.Tensor],
    *,
    used: int,
    tokens_per_image: int,
    device: torch.device,
) -> PlainInput:
    """Cut the padding that all rows share, and shift labels to where transformers looks for them.

    Args:
        batch: Rows of one sample each.
        pictures: uint8 [3, h, w] by image id.
        used: Positions of the longest row.
        tokens_per_image: Positions of a picture.
        device: The model's.
    """
    labels_BS = torch.full_like(batch.tokens_BS, _IGNORED)
    trained = batch.weights_BS[:, :-1] > 0
    labels_BS[:, 1:] = torch.where(trained, batch.labels_BS[:, :-1], _IGNORED)
    starts = [slot.row * used + slot.start for slot in batch.images]
    rows = torch.tensor(starts, dtype=torch.int64)[:, None] + torch.arange(tokens_per_image)
    pixels = None
    if batch.images:
        pixels = torch.stack([pictures[slot.image_id] for slot in batch.images]).to(device)
    return PlainInput(
        tokens_BS=batch.tokens_BS[:, :used].to(device),
        labels_BS=labels_BS[:, :used].to(device),
        image_rows=rows.flatten().to(device),
        pixels_N3hw=pixels,
    )


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as transformers' `eager` has it: all scores in memory, their softmax in fp32.

    Queries, keys and values are [N, h, P, d], and so is what comes out.
    """
    scores_NhPP = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores_NhPP.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


class PlainVLM(nn.Module):
    """Vision encoder and LLM in one module, as transformers' LLaVA joins them.

    Args:
        run: Settings; modules in `train.freeze` do not train.
        dtype: Of the parameters.
        device: Of the parameters.
        attention: `eager` or `sdpa`, of tower and LLM.
        one_by_one: Encode one picture at a time, not all of a micro-batch at once.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: str,
        one_by_one: bool = False,
    ):
        super().__init__()
        self.one_by_one = one_by_one
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # never a second copy in fp32
        try:
            with torch.device(device):
                self.llm = Qwen2ForCausalLM(qwen2_config(run.model.llm, attention=attention))
        finally:
            torch.set_default_dtype(before)
        self.encoder = build_encoder(run, device=device, dtype=dtype)
        parts: dict[str, nn.Module] = {"llm": self.llm}
        if self.encoder is not None:
            if attention == "eager":
                for layer in self.encoder.tower.encoder.layers:
                    layer.self_attn.attend = eager_attention
            parts |= {
                "vision": self.encoder.tower,
                "resampler": self.encoder.resampler,
                "projector": self.encoder.projector,
            }
        for module in run.train.freeze:
            parts[module].requires_grad_(False)

    def adamw_groups(self, run: RunConfig) -> list[dict]:
        """AdamW's groups as ours are: one a module and a decay setting."""
        named = ((name.removeprefix("encoder."), p) for name, p in self.named_parameters())
        return parameter_groups(named, run.optim)

    def forward(self, inputs: PlainInput, *, loss_divisor: float) -> torch.Tensor:
        """Sum of the loss over the trained positions, over `loss_divisor`: scalar."""
        embedded_BSH = self.llm.get_input_embeddings()(inputs.tokens_BS)
        if inputs.pixels_N3hw is not None:
            vision_nH = torch.cat([out.flatten(0, 1) for out in self._encode(inputs.pixels_N3hw)])
            flat = embedded_BSH.flatten(0, 1)
            flat = flat.index_copy(0, inputs.image_rows, vision_nH.to(flat.dtype))
            embedded_BSH = flat.view_as(embedded_BSH)
        output = self.llm(
            inputs_embeds=embedded_BSH,
            labels=inputs.labels_BS,
            num_items_in_batch=torch.tensor(loss_divisor, device=embedded_BSH.device),
        )
        return output.loss

    def _encode(self, pixels_N3hw: torch.Tensor) -> Sequence[torch.Tensor]:
        """[N, T, H] in one piece, or one picture each."""
        parts = pixels_N3hw.split(1) if self.one_by_one else [pixels_N3hw]
        return [self.encoder(part) for part in parts]
