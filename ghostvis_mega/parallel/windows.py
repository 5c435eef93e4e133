"""The stretches of a step whose pictures are encoded, read and differentiated together.

All pictures of a step at once need either memory for all their activations or a second forward.
In windows of a few micro-batches the activations of one window are there at a time, and each
picture goes through the tower once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ghostvis_mega.parallel.dispatch import ImageDispatch
from ghostvis_mega.parallel.image_rows import ImageRows


@dataclass(frozen=True)
class PictureWindow:
    """Consecutive micro-batches of every replica, and one rank's part of their pictures."""

    num_micro_batches: int
    """Of each replica."""
    dispatch: ImageDispatch
    pixels_N3hw: torch.Tensor
    """uint8, the pictures that this rank encodes, by ascending id."""
    image_rows: ImageRows | None = None
    """What each context-parallel rank needs of the pictures; None without context parallelism."""


def cut_windows(num_micro_batches: int, size: int) -> list[slice]:
    """Places of each window's micro-batches in those of a replica; the last window may be shorter.

    Args:
        num_micro_batches: Of a replica in a step.
        size: Micro-batches of a window (`tower.window`); 0: all.
    """
    size = size or num_micro_batches
    return [slice(at, at + size) for at in range(0, num_micro_batches, size)]


def images_of(windows: Sequence[PictureWindow], rank: int) -> frozenset[int]:
    """The pictures that a rank encodes in a step."""
    return frozenset(image for window in windows for image in window.dispatch.encode[rank])


def own_pictures(windows: Sequence[PictureWindow], rank: int) -> Mapping[int, torch.Tensor]:
    """uint8 [3, h, w] by image id: what this rank encodes in a step.

    Args:
        windows: Of this rank.
        rank: This rank.
    """
    return {
        image: pixels_3hw
        for window in windows
        for image, pixels_3hw in zip(window.dispatch.encode[rank], window.pixels_N3hw, strict=True)
    }
