"""Answers to held-out questions by our modules and by transformers, from a run's checkpoint and
its export."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_image
from ghostvis_mega.parallel.groups import Groups
from tests.convert.native_model import NativeModel


@dataclass(frozen=True)
class Answer:
    """What both say to one question."""

    ours: list[int]
    theirs: list[int]
    reference: str
    error: float
    """Greatest difference of the scores of the first token."""


def both(
    checkpoint: Path,
    export: Path,
    data: Path,
    groups: Groups,
    *,
    count: int,
    length: int | None = None,
) -> list[Answer]:
    """Answers to `count` questions about as many pictures.

    Args:
        checkpoint: Of a run.
        export: Of the same weights.
        data: Prepared dataset.
        groups: Of one process.
        count: Number of questions.
        length: Tokens of each answer, whatever ends it; None: up to the end token.
    """
    ours = NativeModel(checkpoint, groups)
    vision = ours.config.vision
    assert vision is not None
    theirs = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    dataset = Dataset.open(data)
    specials = dataset.tokenizer.specials
    image, stop = specials["image"], specials["im_end"] if length is None else -1
    settings = {"max_new_tokens": length or 8} | ({} if length is None else {"eos_token_id": None})
    found = []
    step = max(1, dataset.num_samples // count)
    for index in range(0, step * count, step):
        tokens, image_ids, reference, question = dataset.prompt(index)
        raw = [dataset.image_bytes(i) for i in image_ids]
        pixels = torch.stack(
            [load_image(b, image_size=vision.image_size, augment_seed=None) for b in raw]
        )
        prompt = list(tokens)
        answer = ours.greedy(prompt, pixels, image=image, count=length or 8, stop=stop)
        content = [*({"type": "image"} for _ in raw), {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        pictures = [Image.open(io.BytesIO(b)) for b in raw]
        inputs = processor(text=text, images=pictures, return_tensors="pt")
        ids = theirs.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
        with torch.no_grad():
            scores = theirs(**inputs).logits[0, -1]
        error = (ours.logits(prompt, pixels, image=image)[-1] - scores).abs().max()
        ends = [place for place, token in enumerate(ids) if token == stop]
        found.append(Answer(answer, ids[: ends[0]] if ends else ids, reference, float(error)))
    return found
