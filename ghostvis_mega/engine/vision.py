"""Running the vision encoder on the pictures this rank owns, before and after the LLM."""

import torch

from ghostvis_mega.config.schema import TowerConfig
from ghostvis_mega.model.vision import VisionEncoder


def keeps_graphs(encoder: VisionEncoder, settings: TowerConfig) -> bool:
    """Whether activations are held from the forward to the backward."""
    if settings.backward != "auto":
        return settings.backward == "keep"
    # Of a frozen tower nothing is held, and a second forward would be its dearest part.
    return settings.window > 0 or not any(p.requires_grad for p in encoder.tower.parameters())


class VisionRunner:
    """Forward now, backward when the gradients have come back.

    Args:
        encoder: Tower, resampler and projector.
        settings: `recompute` keeps nothing in between and runs the forward twice; `keep` holds the
            graph; `auto` is one of them.
        width: LLM hidden size.
    """

    def __init__(self, encoder: VisionEncoder, settings: TowerConfig, *, width: int):
        self.encoder, self.settings, self.width = encoder, settings, width
        self.trains = any(p.requires_grad for p in encoder.parameters())
        self.keeps = keeps_graphs(encoder, settings)
        self._pixels: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []

    def encode(self, pixels_N3hw: torch.Tensor, *, for_training: bool) -> torch.Tensor:
        """Embeddings of this rank's pictures: [N, T, H], without a graph.

        Args:
            pixels_N3hw: uint8, on the encoder's device; N may be 0.
            for_training: Whether `backward` will follow.
        """
        self._pixels = (
            list(pixels_N3hw.split(self.settings.images_per_forward)) if len(pixels_N3hw) else []
        )
        keep = for_training and self.trains and self.keeps
        with torch.set_grad_enabled(keep):
            outputs = [self.encoder(part) for part in self._pixels]
        self._kept = outputs if keep else []
        if not for_training:
            self._pixels = []
        if not outputs:
            return pixels_N3hw.new_zeros(
                (0, self.encoder.tokens_per_image, self.width), dtype=torch.float32
            )
        return torch.cat([out.detach() for out in outputs]).float()

    def backward(self, gradients_NTH: torch.Tensor) -> None:
        """Accumulate parameter gradients of the pictures that `encode` saw.

        Args:
            gradients_NTH: fp32 gradients of the embeddings.
        """
        parts = gradients_NTH.split(self.settings.images_per_forward) if self._pixels else []
        for index, gradient in enumerate(parts):
            out = self._kept[index] if self._kept else self.encoder(self._pixels[index])
            torch.autograd.backward(out, gradient.to(out.dtype))
            if self._kept:
                self._kept[index] = out.detach()
        self._pixels, self._kept = [], []
