"""Small datasets that make training hard: text alone, crowds of pictures, damage, odd lengths."""

import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.layout import shard_name
from ghostvis_mega.data.manifest import TOKENS
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer

VOCAB = 320
CROWD = 40
"""Pictures of the sample that has most."""
SEQ_LENGTH = 80
"""Of runs on this data, with one position a picture: the crowd and its text just fit."""
WORDS = ("red", "blue", "dog", "cat", "house", "tree", "big", "small", "runs", "sits", "above")

KINDS = {
    "mixed": "no, one or several pictures a sample",
    "text": "no pictures on any rank",
    "one picture": "one picture in the whole batch, so all other ranks have none",
    "crowd": f"a sample with {CROWD} pictures",
    "lengths": "samples as long as a sequence, shorter by one, and longer (left out)",
    "few": "fewer sequences than a batch has rows: one comes up several times",
    "damage": "a picture and a sample whose stored bytes are wrong",
    "nothing": "every sample is damaged: nothing is trained",
}
"""Datasets by name, and what is hard about them."""


def write_datasets(folder: Path) -> None:
    """Write one dataset a kind, and `heldout` for previews, as `KIND.gvd` into a new folder."""
    folder.mkdir(parents=True)
    lines = [" ".join(WORDS), *(["system", "user", "assistant", "tool"])]
    tokenizer = train_tokenizer(lines * 4, vocab_size=VOCAB, path=folder / "tokenizer.model")
    rows = {
        "mixed": _samples("mixed", 24, images=(0, 1, 1, 3), words=range(3, 20)),
        "text": _samples("text", 12, images=(0,), words=range(3, 20)),
        "one picture": _one_picture(),
        "crowd": _samples("crowd", 8, images=(CROWD, 0, 1, 0), words=range(2, 6)),
        "lengths": _samples(
            "lengths",
            60,
            images=(0,),
            words=[n // 2 for n in range(SEQ_LENGTH - 76, SEQ_LENGTH - 16)],
        ),
        "few": _samples("few", 2, images=(2, 0), words=range(20, 24)),
        "damage": _samples("damage", 16, images=(1, 0), words=range(20, 24)),
        "nothing": _samples("nothing", 4, images=(0, 1), words=range(20, 24)),
        "heldout": _samples("heldout", 4, images=(1, 0), words=range(3, 9)),
    }
    for kind, source in rows.items():
        _write(folder / f"{kind}.gvd", source, tokenizer)
    lengths = Dataset.open(folder / "lengths.gvd").lengths(tokens_per_image=1).tolist()
    assert {SEQ_LENGTH - 1, SEQ_LENGTH} <= set(lengths) and max(lengths) > SEQ_LENGTH
    damage = folder / "damage.gvd"
    _damage_sample(damage, 3)
    _damage_picture(damage, 1)
    for sample in range(4):
        _damage_sample(folder / "nothing.gvd", sample)


def _write(path: Path, rows: Iterator[Row], tokenizer: Tokenizer) -> None:
    ingest([Source(path.stem, rows)], tokenizer=tokenizer, path=path)


def _samples(
    name: str, count: int, *, images: tuple[int, ...], words: Sequence[int]
) -> Iterator[Row]:
    """Rows that go through the numbers of pictures and words in turn."""
    draw = random.Random(name)
    for index in range(count):
        yield _row(
            name,
            index,
            images=images[index % len(images)],
            words=words[index % len(words)],
            draw=draw,
        )


def _one_picture() -> Iterator[Row]:
    """Samples that fill a sequence each, so that a picture stays alone in its batch of four or
    more."""
    draw = random.Random("one")
    for index in range(16):
        yield _row("one", index, images=int(index == 5), words=(SEQ_LENGTH - 30) // 2, draw=draw)


def _row(name: str, index: int, *, images: int, words: int, draw: random.Random) -> Row:
    # A word is two tokens, so every other text gets one more.
    text = "".join(f" {draw.choice(WORDS)}" for _ in range(words)) + "?" * (index % 2)
    question = (*(ImagePart() for _ in range(images)), f"what is{text}")
    return Row(
        key=f"{name}/{index}",
        turns=(Turn("user", question), Turn("assistant", (f" {draw.choice(WORDS)}",))),
        images=tuple(_picture(draw) for _ in range(images)),
    )


def _picture(draw: random.Random) -> bytes:
    """A PNG of 16 x 16 random pixels."""
    pixels = np.frombuffer(draw.randbytes(16 * 16 * 3), dtype=np.uint8).reshape(16, 16, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def _damage_sample(path: Path, sample: int) -> None:
    """Flip the last token of a sample."""
    record = Dataset.open(path).sample_index[sample]
    last = int(record["tok_off"]) + int(record["tok_len"]) - 1
    _flip(path / TOKENS, 2 * last)


def _damage_picture(path: Path, image: int) -> None:
    record = Dataset.open(path).image_index[image]
    _flip(path / shard_name(int(record["shard"])), int(record["offset"]) + 30)


def _flip(file: Path, offset: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte[0] ^ 0xFF]))
