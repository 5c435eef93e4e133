"""A small real dataset: pictures drawn here, shared pictures, several pictures, text only."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer

CORPUS = [
    "what color is the shape?",
    "is there a circle in the picture?",
    "how many shapes do you see?",
    "yes",
    "no",
    "the shape is blue.",
    "you are a helpful assistant.",
    "user",
    "system",
    "tool",
]


def png(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A noisy picture as PNG bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(folder: Path, *, count: int = 60) -> list[Row]:
    """Conversations of every shape; pictures 2k and 2k + 1 hold the same bytes."""
    for number in range(10):
        (folder / f"{number}.png").write_bytes(png(number // 2))
    files = [folder / f"{number}.png" for number in range(10)]
    rows = []
    for number in range(count):
        answer = ("yes", "no", "the shape is blue.")[number % 3]
        kind = number % 6
        pictures = () if kind == 5 else (files[number % 10],)
        if kind == 4:
            pictures = (files[number % 10], files[(number + 3) % 10])
        turns = [
            Turn("user", (*(ImagePart() for _ in pictures), CORPUS[number % 3])),
            Turn("assistant", (answer,)),
        ]
        if kind == 3:
            turns = [
                Turn("system", (CORPUS[6],)),
                *turns,
                Turn("user", ("is it " * (1 + number % 7),)),
                Turn("assistant", ("no",)),
            ]
        rows.append(Row(f"row/{number}", tuple(turns), pictures, (answer, "also")))
    return rows


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    return train_tokenizer(CORPUS, vocab_size=400, path=path)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return make_rows(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def build(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Ingest rows into a fresh directory and return it."""

    def _build(rows: list, name: str = "made.gvd") -> Path:
        ingest([Source("made", rows)], tokenizer=tokenizer, path=tmp_path / name)
        return tmp_path / name

    return _build


@pytest.fixture(scope="session")
def dataset(
    rows: list[Row], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Dataset:
    path = tmp_path_factory.mktemp("dataset") / "mixed.gvd"
    ingest([Source("mixed", rows)], tokenizer=tokenizer, path=path)
    return Dataset.open(path)
