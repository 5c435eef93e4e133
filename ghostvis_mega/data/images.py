"""Encoded bytes to a tensor, with optional augmentation that is a function of its seed alone."""

import numpy as np
import torch

from ghostvis_mega.data.pixels import decode_rgb

_LARGEST_SHIFT = 1 / 8
"""Of the image's side, in both directions."""


def load_image(data: bytes, *, image_size: int, augment_seed: int | None) -> torch.Tensor:
    """Decode one image; pure, so that any process can call it.

    Args:
        image_size: side of the square result; the picture is resized with its aspect given up.
        augment_seed: random mirroring and shift of that seed; None changes nothing.

    Returns:
        uint8 [3, image_size, image_size]; normalisation belongs to the model.

    Raises:
        ImageError: the bytes are no image, damaged, or too large.
    """
    pixels_HWC = decode_rgb(data, image_size=image_size)
    if augment_seed is not None:
        pixels_HWC = _augment(pixels_HWC, np.random.Generator(np.random.PCG64(augment_seed)))
    return torch.from_numpy(np.array(pixels_HWC.transpose(2, 0, 1), order="C"))


def _augment(pixels_HWC: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Mirror left and right with probability 1/2 and shift, repeating the edge.

    Never upside down: what stands upright is part of what things look like.
    """
    flip_x = generator.integers(0, 2)
    reach = int(pixels_HWC.shape[0] * _LARGEST_SHIFT)
    shift_y, shift_x = generator.integers(-reach, reach + 1, size=2)
    if flip_x:
        pixels_HWC = pixels_HWC[:, ::-1]
    side = pixels_HWC.shape[0]
    rows = np.clip(np.arange(side) - shift_y, 0, side - 1)
    columns = np.clip(np.arange(side) - shift_x, 0, side - 1)
    return pixels_HWC[rows][:, columns]
