"""Encoded bytes to a tensor, with optional augmentation that is a function of its seed alone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ghostvis_mega.data.corpus import Corpus
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.pixels import ImageError, decode_rgb
from ghostvis_mega.utils.errors import DataError

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


def load_pixels(
    dataset: Dataset | Corpus,
    image_ids: Sequence[int],
    *,
    size: int,
    seeds: Sequence[int] | None,
    on_damage: Callable[[int, str], None] | None = None,
) -> torch.Tensor:
    """Decoded pictures: uint8 [n, 3, size, size].

    Args:
        dataset: Holds them.
        image_ids: Which.
        size: Side in pixels.
        seeds: One a picture for random augmentation; None shows them as they are.
        on_damage: Told the id and the problem of each damaged picture, which is then black; None
            lets damage stop the reading.

    Raises:
        DataError: A picture is damaged; names it.
    """
    pictures = torch.zeros((len(image_ids), 3, size, size), dtype=torch.uint8)
    for index, image in enumerate(image_ids):
        seed = None if seeds is None else seeds[index]
        try:
            pictures[index] = load_image(
                dataset.image_bytes(image), image_size=size, augment_seed=seed
            )
        except DataError as error:
            problem = str(error)
            if isinstance(error, ImageError):
                problem = f"image {image} of {dataset.path} cannot be used: {error}"
            if on_damage is None:
                raise DataError(problem) from error
            on_damage(image, problem)
    return pictures


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
