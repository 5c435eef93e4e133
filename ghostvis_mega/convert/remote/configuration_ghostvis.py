"""Configuration of GhostVis models whose connector transformers does not have."""

from typing import Any

from transformers import LlavaConfig


class GhostVisConfig(LlavaConfig):
    """LLaVA's configuration, what the connector is, and whether the tower's last norm is used."""

    model_type = "ghostvis_vl"

    connector: dict[str, Any] | None = None
    """kind (`mlp`, `avgpool_mlp` or `perceiver_mlp`), tokens_per_image, num_layers, num_heads."""
    vision_post_norm: bool = False


__all__ = ["GhostVisConfig"]
