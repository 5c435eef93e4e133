"""GhostVis models in transformers: LLaVA with a resampler in front of its projector.

Shapes: N pictures, P patches, T tokens a picture, C tower width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ghostvis_mega.convert.remote.configuration_ghostvis import GhostVisConfig


class GhostVisAveragePool(nn.Module):
    """Averages square blocks of patches."""

    def __init__(self, grid: int, tokens: int):
        super().__init__()
        self.grid, self.side = grid, round(tokens**0.5)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        x_NCgg = x_NPC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.avg_pool2d(x_NCgg, self.grid // self.side).flatten(2).transpose(1, 2)


class GhostVisPerceiverLayer(nn.Module):
    """Latents attend to patches and latents, then an MLP; pre-norm."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_latents = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_NTC: torch.Tensor, patches_NPC: torch.Tensor) -> torch.Tensor:
        latents = self.norm_latents(x_NTC)
        memory = torch.cat([self.norm_patches(patches_NPC), latents], dim=1)
        q = self._heads(self.q_proj(latents))
        k, v = (self._heads(part) for part in self.kv_proj(memory).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_NTC = x_NTC + self.out_proj(attended)
        return x_NTC + self.fc2(F.gelu(self.fc1(self.norm_mlp(x_NTC))))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class GhostVisPerceiver(nn.Module):
    """Learned latents that read the patches."""

    def __init__(self, width: int, tokens: int, num_layers: int, num_heads: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(tokens, width))
        self.layers = nn.ModuleList(
            GhostVisPerceiverLayer(width, num_heads) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        latents_NTC = self.latents.expand(x_NPC.shape[0], -1, -1)
        for layer in self.layers:
            latents_NTC = layer(latents_NTC, x_NPC)
        return self.norm(latents_NTC)


class GhostVisConnector(nn.Module):
    """Resampler and two-layer MLP."""

    def __init__(self, config: GhostVisConfig):
        super().__init__()
        vision, settings = config.vision_config, config.connector
        width, out = vision.hidden_size, config.text_config.hidden_size
        kind, tokens = settings["kind"], settings["tokens_per_image"]
        self.resampler: nn.Module = nn.Identity()
        if kind == "avgpool_mlp":
            self.resampler = GhostVisAveragePool(vision.image_size // vision.patch_size, tokens)
        elif kind == "perceiver_mlp":
            self.resampler = GhostVisPerceiver(
                width, tokens, settings["num_layers"], settings["num_heads"]
            )
        elif kind != "mlp":
            raise ValueError(f"connector.kind={kind!r} is unknown")
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.resampler(x_NPC))))


class GhostVisPreTrainedModel(LlavaPreTrainedModel):
    config_class = GhostVisConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GhostVisPerceiver):
            nn.init.normal_(module.latents, std=0.02)


class GhostVisModel(GhostVisPreTrainedModel, LlavaModel):
    """Tower, connector and language model without its head."""

    def __init__(self, config: GhostVisConfig):
        super().__init__(config)
        self.multi_modal_projector = GhostVisConnector(config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, return_dict: bool | None = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """Embeddings of pictures: `pooler_output`, one [T, hidden] a picture."""
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"):
            kwargs.pop(name, None)
        kwargs["output_hidden_states"] = True
        output = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        features_NPC = output.hidden_states[self.config.vision_feature_layer]
        if self.config.vision_post_norm:
            features_NPC = self.vision_tower.post_layernorm(features_NPC)
        if self.config.vision_feature_select_strategy == "default":
            features_NPC = features_NPC[:, 1:]
        output.pooler_output = list(self.multi_modal_projector(features_NPC))
        return output if return_dict or return_dict is None else output.to_tuple()


class GhostVisForConditionalGeneration(GhostVisPreTrainedModel, LlavaForConditionalGeneration):
    """The whole model, for generation."""

    def __init__(self, config: GhostVisConfig):
        super().__init__(config)
        self.model = GhostVisModel(config)
        self.post_init()


__all__ = ["GhostVisForConditionalGeneration", "GhostVisModel", "GhostVisPreTrainedModel"]
