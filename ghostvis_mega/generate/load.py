"""From a path to a model with its weights."""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.convert.assets import image_processor
from ghostvis_mega.convert.hf_template import optional_json
from ghostvis_mega.convert.mapping import Parts
from ghostvis_mega.generate.decoder import Decoder
from ghostvis_mega.generate.engine import LoadedModel
from ghostvis_mega.generate.kernels import Kernels, TorchKernels
from ghostvis_mega.generate.memory import memory_told
from ghostvis_mega.generate.pictures import DEFAULT_CACHE_BYTES, EmbeddingCache, PictureEncoder
from ghostvis_mega.generate.ranks import Ranks
from ghostvis_mega.generate.weights import ModelSource, open_model
from ghostvis_mega.model.vision import VisionEncoder

log = logging.getLogger(__name__)

_COMPARED = (
    "size",
    "do_resize",
    "do_center_crop",
    "do_pad",
    "do_rescale",
    "do_normalize",
    "image_mean",
    "image_std",
    "resample",
)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@memory_told()
def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    kernels: Kernels | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    check: bool = True,
) -> LoadedModel:
    """Read a model's weights.

    Args:
        path: A checkpoint of any layout, or a Hugging Face directory.
        device: Of the model.
        dtype: Of weights and activations.
        ranks: That share the language model; each encodes pictures by itself.
        kernels: Of the steps of decoding; None: what suits the device.
        cache_bytes: Most memory for embeddings of pictures.
        check: Compare files with their digests, where they have any.

    Raises:
        CheckpointError: It is no sound model.
        OutOfMemory: It does not fit.
    """
    began = time.perf_counter()
    with open_model(path, check=check) as source:
        decoder = Decoder(
            source.model.llm,
            source.read,
            device=device,
            dtype=dtype,
            ranks=ranks,
            kernels=kernels or default_kernels(source.model, device),
        )
        if note := preparation_note(source):
            log.warning(note)
        pictures = None
        if source.model.vision is not None:
            encoder = _encoder(source, device=device, dtype=dtype)
            pictures = PictureEncoder(encoder, EmbeddingCache(cache_bytes))
        loaded = LoadedModel(source.model, decoder, pictures)
    log.info("loaded %s in %.1f s", path, time.perf_counter() - began)
    return loaded


def default_kernels(model: ModelConfig, device: torch.device) -> Kernels:
    """Fused ones on a GPU, where they fit the model."""
    size = model.llm.head_dim
    if device.type != "cuda" or size < 16 or size & (size - 1):
        return TorchKernels()
    from ghostvis_mega.generate.triton_kernels import TritonKernels

    return TritonKernels()


def preparation_note(source: ModelSource) -> str | None:
    """A sentence where a directory's own settings prepare pictures otherwise than we do."""
    if source.model.vision is None:
        return None
    file, own = _preparation(source.path)
    ours = image_processor(Parts.of(source.model))
    if isinstance(side := own.get("size"), int):
        # Before sizes had names: a square for SigLIP, the shorter side for CLIP.
        square = source.model.vision.kind == "siglip"
        own["size"] = {"height": side, "width": side} if square else {"shortest_edge": side}
    other = [key for key in _COMPARED if key in own and own[key] != ours.get(key, False)]
    if not other:
        return None
    return (
        f"{file} asks for {', '.join(f'{key}={own[key]}' for key in other)}; here a picture is "
        f"resized to a square of {source.model.vision.image_size} pixels whole, as in our "
        "training, so answers may differ from other programs'"
    )


def _preparation(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Settings of a directory's image processor and their file, as transformers looks for them."""
    file = folder / "processor_config.json"
    nested = optional_json(file).get("image_processor")
    if isinstance(nested, dict):
        return file, nested
    file = folder / "preprocessor_config.json"
    return file, optional_json(file)


def _encoder(source: ModelSource, *, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    with torch.device(device):
        encoder = VisionEncoder(source.model)
    for name, parameter in encoder.named_parameters():
        parameter.data = source.read(name).to(device=device, dtype=dtype)
        parameter.requires_grad_(False)
    return encoder.eval()
