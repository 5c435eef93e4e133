"""Vision towers: SigLIP's and CLIP's encoders, parameter by parameter those of transformers.

Names, shapes and operations are those of transformers' `SiglipVisionModel` and `CLIPVisionModel`
without a pooling head, so that weights go in and out as they are and embeddings are the same bit by
bit. They are modules of our own because importing transformers reads 3,000 files, which is a third
of what a rank needs to start on a CPU.

Shape legend: N images, P patches and CLIP's class token, C tower width, h heads, d head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ghostvis_mega.config.schema import TOWER_KINDS, VisionConfig
from ghostvis_mega.model.vision_kernels import ACTIVATIONS


class VisionEmbeddings(nn.Module):
    """Patches by a strided convolution, and a learned vector for each position; CLIP puts a class
    token before them and has no bias."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        clip = vision.kind == "clip"
        width, patch = vision.hidden_size, vision.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width)) if clip else None
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=not clip)
        self.position_embedding = nn.Embedding(vision.grid**2 + clip, width)

    def forward(self, pixels_N3hw: torch.Tensor) -> torch.Tensor:
        """[N, P, C]; rows and columns that fill no patch are left out."""
        x_NPC = self.patch_embedding(pixels_N3hw).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x_NPC = torch.cat([self.class_embedding.expand(len(x_NPC), 1, -1), x_NPC], dim=1)
        return x_NPC + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Full attention within each image, by `attend`: queries, keys and values [N, h, P, d] to the
    same."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """[N, P, C] -> [N, P, C]."""
        q, k, v = (self._heads(part(x_NPC)) for part in (self.q_proj, self.k_proj, self.v_proj))
        attended_NhPd = self.attend(q, k, v)
        return self.out_proj(attended_NhPd.transpose(1, 2).flatten(2))

    def _heads(self, x_NPC: torch.Tensor) -> torch.Tensor:
        return x_NPC.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class VisionMLP(nn.Module):
    """Two products and an activation between them, by transformers' `hidden_act`."""

    def __init__(self, width: int, ffn: int, activation: str):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """[N, P, C] -> [N, P, C]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x_NPC)))


class VisionLayer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual sum."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        width, (activation, eps) = vision.hidden_size, TOWER_KINDS[vision.kind]
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = VisionAttention(width, vision.num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = VisionMLP(width, vision.ffn_hidden_size, activation)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """[N, P, C] -> [N, P, C]."""
        x_NPC = x_NPC + self.self_attn(self.layer_norm1(x_NPC))
        return x_NPC + self.mlp(self.layer_norm2(x_NPC))


class VisionLayers(nn.Module):
    """The layers, under the name that transformers has for them."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision.num_layers))


class VisionTower(nn.Module):
    """Parts of a tower; `VisionEncoder` runs them, as far as its feature layer.

    Random weights, to be filled by `initialize` or from a checkpoint.
    """

    def __init__(self, vision: VisionConfig):
        super().__init__()
        width, eps = vision.hidden_size, TOWER_KINDS[vision.kind].layer_norm_eps
        self.embeddings = VisionEmbeddings(vision)
        # transformers' spelling, and so that of the published weights.
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps) if vision.kind == "clip" else None
        self.encoder = VisionLayers(vision)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)
