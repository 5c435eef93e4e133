"""Answers to held-out questions by our modules and by transformers, from a run's checkpoint and
its export."""

import io
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_image
from ghostvis_mega.parallel.groups import Groups
from tests.convert.native_model import NativeModel

MAX_NEW_TOKENS = 8


def both(
    checkpoint: Path, export: Path, data: Path, groups: Groups, *, count: int
) -> tuple[list[str], list[str], list[str]]:
    """(ours, transformers', right answers) of `count` questions about as many pictures."""
    ours = NativeModel(checkpoint, groups)
    vision = ours.config.vision
    assert vision is not None
    theirs = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    dataset = Dataset.open(data)
    tokenizer = dataset.tokenizer
    image, stop = tokenizer.specials["image"], tokenizer.specials["im_end"]
    step = max(1, dataset.num_samples // count)
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    for index in range(0, step * count, step):
        tokens, image_ids, reference, question = dataset.prompt(index)
        raw = [dataset.image_bytes(i) for i in image_ids]
        pixels = [load_image(b, image_size=vision.image_size, augment_seed=None) for b in raw]
        answer = ours.greedy(
            list(tokens), torch.stack(pixels), image=image, count=MAX_NEW_TOKENS, stop=stop
        )
        found[0].append(tokenizer.decode(answer))
        content = [*({"type": "image"} for _ in raw), {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        pictures = [Image.open(io.BytesIO(b)) for b in raw]
        inputs = processor(text=prompt, images=pictures, return_tensors="pt")
        out = theirs.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        found[1].append(processor.tokenizer.decode(ids, skip_special_tokens=True))
        found[2].append(reference)
    return found
