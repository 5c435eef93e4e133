"""Pictures to embeddings, kept for the next prompt that shows the same picture."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ghostvis_mega.data.encode import MAX_IMAGE_BYTES
from ghostvis_mega.data.images import load_image
from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import read_small

DEFAULT_CACHE_BYTES = 1 << 30

Picture = bytes | Path
"""Encoded, or its file, which is read when it is needed: a file of prompts may name more pictures
than memory holds."""


def picture_bytes(picture: Picture) -> bytes:
    """An encoded picture.

    Raises:
        DataError: The file cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    try:
        return read_small(picture, limit=MAX_IMAGE_BYTES)
    except OSError as error:
        raise DataError(f"image {picture} cannot be read: {error.strerror}") from error


@dataclass
class CacheStatistics:
    """What a cache has done since it was made."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0
    held: int = 0
    """Pictures in it."""
    held_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of look-ups that found something; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


class EmbeddingCache:
    """Embeddings by picture; beyond `limit_bytes` the ones longest unused go.

    Args:
        limit_bytes: Of all embeddings together; 0 keeps none.
    """

    def __init__(self, limit_bytes: int = DEFAULT_CACHE_BYTES):
        self.limit_bytes = limit_bytes
        self.statistics = CacheStatistics()
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, key: str) -> torch.Tensor | None:
        """What is held, if it is; counts."""
        found = self._held.get(key)
        if found is None:
            self.statistics.misses += 1
            return None
        self.statistics.hits += 1
        self._held.move_to_end(key)
        return found

    def put(self, key: str, value: torch.Tensor) -> None:
        """Hold a tensor; it is copied where it is part of a larger one."""
        size = value.numel() * value.element_size()
        if size > self.limit_bytes or key in self._held:
            return
        self._held[key] = value.clone()
        statistics = self.statistics
        statistics.held_bytes += size
        while statistics.held_bytes > self.limit_bytes:
            _, old = self._held.popitem(last=False)
            statistics.held_bytes -= old.numel() * old.element_size()
            statistics.evicted += 1
        statistics.held = len(self._held)


class PictureEncoder:
    """Tower and connector with a cache in front.

    Args:
        encoder: On its device, in its type.
        cache: Holds embeddings.
        batch: Pictures that are encoded side by side.
    """

    def __init__(self, encoder: VisionEncoder, cache: EmbeddingCache, *, batch: int = 32):
        self.encoder, self.cache, self.batch = encoder.eval(), cache, batch
        weight = encoder.projector.linear_1.weight
        self._device = weight.device
        # What a picture becomes depends on these beside its bytes.
        self._settings = f"{encoder.config.kind} {encoder.config.image_size} {weight.dtype}"

    def key(self, data: bytes) -> str:
        """Under which a picture's embeddings are held."""
        return f"{self._settings} {hashlib.sha256(data).hexdigest()}"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> list[torch.Tensor]:
        """Embeddings [tokens_per_image, H] of each picture; equal ones are encoded once.

        Raises:
            DataError: One is no picture that can be read, or its file cannot.
        """
        keys: list[str] = []
        found: dict[str, torch.Tensor] = {}
        missing: dict[str, bytes] = {}
        for picture in pictures:
            data = picture_bytes(picture)
            keys.append(key := self.key(data))
            if key in found or key in missing:
                self.cache.statistics.hits += 1
                continue
            held = self.cache.get(key)
            if held is None:
                missing[key] = data
            else:
                found[key] = held
        names = list(missing)
        for start in range(0, len(names), self.batch):
            chosen = names[start : start + self.batch]
            side = self.encoder.config.image_size
            pixels = torch.stack(
                [load_image(missing[k], image_size=side, augment_seed=None) for k in chosen]
            )
            embeddings_NTH = self.encoder(pixels.to(self._device))
            for key, embedding_TH in zip(chosen, embeddings_NTH, strict=True):
                found[key] = embedding_TH
                self.cache.put(key, embedding_TH)
        return [found[key] for key in keys]
