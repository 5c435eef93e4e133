"""The vision side: a SigLIP or CLIP tower, a resampler and a projector into the LLM's width.

Shape legend: N images, P patches, T tokens an image, C tower width, H LLM width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ghostvis_mega.config.schema import ConnectorConfig, ModelConfig
from ghostvis_mega.model.init import initialize
from ghostvis_mega.model.vision_layer import FusedLayers
from ghostvis_mega.model.vision_tower import VisionTower

_PIXEL_STATISTICS = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of each colour that the published weights were trained with."""


class Projector(nn.Module):
    """Two-layer MLP with exact GELU, as in LLaVA 1.5 (names as Hugging Face's
    `multi_modal_projector`)."""

    def __init__(self, width: int, llm_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, llm_width)
        self.linear_2 = nn.Linear(llm_width, llm_width)

    def forward(self, x_NTC: torch.Tensor) -> torch.Tensor:
        """[N, T, C] -> [N, T, H]."""
        return self.linear_2(F.gelu(self.linear_1(x_NTC)))


class AveragePool(nn.Module):
    """Averages square blocks of patches; no parameters."""

    def __init__(self, grid: int, tokens: int):
        super().__init__()
        self.grid, self.side = grid, int(tokens**0.5)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """[N, P, C] -> [N, T, C]."""
        x_NCgg = x_NPC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.avg_pool2d(x_NCgg, self.grid // self.side).flatten(2).transpose(1, 2)


class PerceiverLayer(nn.Module):
    """Latents attend to patches and latents, then an MLP; pre-norm (Flamingo, arXiv 2204.14198,
    section 3.1)."""

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
        """One round of latents looking at patches: [N, T, C]."""
        latents = self.norm_latents(x_NTC)
        memory = torch.cat([self.norm_patches(patches_NPC), latents], dim=1)
        q = self._heads(self.q_proj(latents))
        k, v = (self._heads(part) for part in self.kv_proj(memory).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_NTC = x_NTC + self.out_proj(attended)
        return x_NTC + self.fc2(F.gelu(self.fc1(self.norm_mlp(x_NTC))))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class PerceiverResampler(nn.Module):
    """A fixed number of learned latents that read the patches."""

    def __init__(self, connector: ConnectorConfig, width: int, tokens: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(tokens, width))
        self.layers = nn.ModuleList(
            PerceiverLayer(width, connector.num_heads) for _ in range(connector.num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """[N, P, C] -> [N, T, C]."""
        latents = self.latents.expand(x_NPC.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, x_NPC)
        return self.norm(latents)


class VisionEncoder(nn.Module):
    """Pictures in, LLM embeddings out: `tower`, `resampler`, `projector`.

    The tower's hidden state `feature_layer` is used as transformers' LLaVA uses it: before the
    tower's final LayerNorm unless `post_norm`, and for CLIP without the class token. Parameters
    that this choice leaves unused do not require gradients.

    Args:
        model: Sizes.
        fused: What runs the tower's layers; None: their modules.
    """

    def __init__(self, model: ModelConfig, *, fused: FusedLayers | None = None):
        super().__init__()
        self.fused = fused
        vision, connector = model.vision, model.connector
        assert vision is not None and connector is not None, (
            "a text-only model has no vision encoder"
        )
        self.config, self.connector_config = vision, connector
        self.tokens_per_image = model.tokens_per_image
        self.tower = VisionTower(vision)
        self.resampler: nn.Module = nn.Identity()
        if connector.kind == "avgpool_mlp":
            self.resampler = AveragePool(vision.grid, self.tokens_per_image)
        elif connector.kind == "perceiver_mlp":
            self.resampler = PerceiverResampler(
                connector, vision.hidden_size, self.tokens_per_image
            )
        self.projector = Projector(vision.hidden_size, model.llm.hidden_size)
        mean, std = _PIXEL_STATISTICS[vision.kind]
        self.register_buffer(
            "pixel_mean", 255 * torch.tensor(mean)[:, None, None], persistent=False
        )
        self.register_buffer("pixel_std", 255 * torch.tensor(std)[:, None, None], persistent=False)
        self.num_used_layers = vision.num_layers + 1 + vision.feature_layer
        for parameter in self.unused_parameters():
            parameter.requires_grad_(False)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Tower parameters that no output depends on."""
        unused = list(self.tower.encoder.layers[self.num_used_layers :].parameters())
        if not self.config.post_norm:
            unused += self.tower.post_layernorm.parameters()
        return unused

    def initialize(self, seed: int) -> None:
        """Fill the parameters with values that depend on (seed, name) alone."""
        named = list(self.named_parameters())
        for prefix, std in (
            ("tower.", self.config.init_std),
            ("resampler.", self.connector_config.init_std),
            ("projector.", self.connector_config.init_std),
        ):
            chosen = [(name, parameter) for name, parameter in named if name.startswith(prefix)]
            initialize(chosen, seed=seed, std=std)

    def forward(self, pixels_N3hw: torch.Tensor) -> torch.Tensor:
        """Encode pictures.

        Args:
            pixels_N3hw: uint8 [N, 3, image_size, image_size].

        Returns:
            [N, tokens_per_image, H] in the encoder's dtype.
        """
        dtype = self.projector.linear_1.weight.dtype
        pixels = ((pixels_N3hw.float() - self.pixel_mean) / self.pixel_std).to(dtype)
        return self.projector(self.resampler(self._features(pixels)))

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.tower
        x_NPC = tower.embeddings(pixels)
        if tower.pre_layrnorm is not None:
            x_NPC = tower.pre_layrnorm(x_NPC)
        for layer in tower.encoder.layers[: self.num_used_layers]:
            x_NPC = layer(x_NPC) if self.fused is None else self.fused(layer, x_NPC)
        if self.config.post_norm:
            x_NPC = tower.post_layernorm(x_NPC)
        return x_NPC[:, 1:] if self.config.kind == "clip" else x_NPC
