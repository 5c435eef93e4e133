"""How far a quantised model's predictions are from those of the model it is made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostvis_mega.convert.assets import image_processor
from ghostvis_mega.convert.hf_config import GHOSTVIS_TYPE, parts_from_config
from ghostvis_mega.convert.hf_folder import CONFIG, read_json
from ghostvis_mega.convert.schemes import quantize_model_int8
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_pixels
from ghostvis_mega.utils.errors import CheckpointError, DataError


@dataclass(frozen=True)
class Divergence:
    """Over all compared positions."""

    positions: int
    kl: float
    """Mean of KL(original || quantised), in nats."""
    same_best: float
    """Share of positions with the same most likely token."""


def load_model(folder: Path) -> nn.Module:
    """A directory's model in transformers, in fp32; our own formats by our own code.

    Raises:
        CheckpointError: A tensor is missing, too much, or of another shape.
    """
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    from ghostvis_mega.convert.remote.modeling_ghostvis import GhostVisForConditionalGeneration

    kind = read_json(folder / CONFIG).get("model_type")
    classes = {
        GHOSTVIS_TYPE: GhostVisForConditionalGeneration,
        "llava": LlavaForConditionalGeneration,
    }
    loader: Any = classes.get(str(kind), AutoModelForCausalLM)
    model: nn.Module
    model, told = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[key]:
            raise CheckpointError(f"{folder}: transformers has {key} {sorted(told[key])[:4]}")
    return model.train(False)


@torch.no_grad()
def divergence(
    folder: Path, *, scheme: str, skip_modules: Sequence[str], data: Path | None, count: int
) -> Divergence:
    """Compare a model with itself under the numbers of a quantised one.

    Args:
        folder: The model in floating point.
        scheme: `int8` or `fp8`.
        skip_modules: As for `quantize_hf`.
        data: Prepared dataset whose samples are read; None: random tokens without pictures.
        count: Number of samples.
    """
    inputs = list(_samples(folder, data, count) if data is not None else _random(folder, count))
    model = load_model(folder)
    wanted = [model(**sample).logits[0].log_softmax(dim=-1) for sample in inputs]
    quantize_model_int8(model, skip_modules=skip_modules, scheme=scheme)
    kl, same, positions = 0.0, 0, 0
    for sample, before in zip(inputs, wanted, strict=True):
        after = model(**sample).logits[0].log_softmax(dim=-1)
        kl += float((before.exp() * (before - after)).sum(dim=-1).double().sum())
        same += int((before.argmax(dim=-1) == after.argmax(dim=-1)).sum())
        positions += len(before)
    return Divergence(positions, kl / positions, same / positions)


def check_inputs(folder: Path, data: Path | None) -> None:
    """Raise where `divergence` has nothing to compare.

    Raises:
        CheckpointError: The model predicts no tokens, or fewer than the dataset's tokenizer has.
        DataError: The dataset is missing, damaged or empty.
    """
    llm = parts_from_config(read_json(folder / CONFIG), folder).llm
    if llm is None:
        raise CheckpointError(
            f"{folder} holds no language model, so there are no predictions whose KL could be "
            "measured: give --samples 0, and no --data"
        )
    if data is None:
        return
    dataset = Dataset.open(data)
    if not dataset.num_samples:
        raise DataError(f"{data} holds no samples")
    if dataset.tokenizer.vocab_size > llm.vocab_size:
        raise CheckpointError(
            f"{data} has {dataset.tokenizer.vocab_size} tokens and {folder} {llm.vocab_size}: it "
            "is another model's dataset"
        )


def _random(folder: Path, count: int) -> Iterator[dict[str, torch.Tensor]]:
    config = read_json(folder / CONFIG)
    llm = parts_from_config(config, folder).llm
    assert llm is not None
    vocab = llm.vocab_size
    image = config.get("image_token_index", -1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens_S = torch.randint(0, vocab, (64,), generator=generator)
        yield {"input_ids": torch.where(tokens_S == image, (image + 1) % vocab, tokens_S)[None]}


def _samples(folder: Path, data: Path, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Samples as training reads them, pictures at full width."""
    parts = parts_from_config(read_json(folder / CONFIG), folder)
    dataset = Dataset.open(data)
    image = dataset.tokenizer.specials["image"]
    step = max(1, dataset.num_samples // count)
    for index in range(0, step * min(count, dataset.num_samples), step):
        sample = dataset.sample(index)
        tokens: list[int] = []
        for token in sample.tokens.tolist():
            tokens += [token] * (parts.tokens_per_image if token == image else 1)
        inputs = {"input_ids": torch.tensor([tokens])}
        if sample.image_ids and parts.vision is not None:
            settings = image_processor(parts)
            mean, std = (
                torch.tensor(settings[key])[:, None, None] for key in ("image_mean", "image_std")
            )
            size = parts.vision.image_size
            pixels_N3hw = load_pixels(dataset, sample.image_ids, size=size, seeds=None)
            inputs["pixel_values"] = (pixels_N3hw.float() / 255 - mean) / std
        yield inputs
