"""Chat templates that train what every role says: the same text, another mask, and no picture."""

from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.layout import Role
from ghostvis_mega.data.manifest import TemplateInfo
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.data.styles import STYLES
from ghostvis_mega.data.template import ChatTemplate, ImagePart, Turn, load_tokenizer
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.verify import verify_dataset

NAMES = [name for name in STYLES if not name.endswith("-turns")]
TURNS = [
    Turn("system", ("you are a helpful assistant.",)),
    Turn("user", (ImagePart(), "what color is the shape?", ImagePart(), "is there a circle?")),
    Turn("assistant", ("yes",)),
    Turn("tool", ("no",)),
    Turn("assistant", ("the shape is blue.",)),
]


@pytest.fixture
def made(rows: list[Row], tokenizer: Tokenizer, tmp_path: Path) -> Dataset:
    path = tmp_path / "turns.gvd"
    ingest([Source("made", rows)], tokenizer=tokenizer, template="chatml-turns", path=path)
    return Dataset.open(path)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_same_and_each_role_is_trained(tokenizer: Tokenizer, name: str) -> None:
    loaded = load_tokenizer(tokenizer.path, template=name)
    plain, turns = (
        ChatTemplate(loaded, each).encode(TURNS, num_images=2) for each in (name, name + "-turns")
    )
    assert turns.tokens.tolist() == plain.tokens.tolist()
    assert turns.image_positions == plain.image_positions
    inside = np.zeros(len(turns.tokens), dtype=bool)
    for span in turns.spans:
        inside[span["start"] : span["start"] + span["len"]] = True
    inside[list(turns.image_positions)] = False
    assert turns.trained_mask.tolist() == inside.tolist()
    # Negative control: answers alone are fewer, and all of them are among these.
    assert (plain.trained_mask <= turns.trained_mask).all()
    assert plain.trained_mask.sum() < turns.trained_mask.sum()


@pytest.mark.parametrize("name", NAMES)
def test_both_names_write_alike(name: str) -> None:
    assert TemplateInfo(name=name + "-turns").writes == TemplateInfo(name=name).writes == name


def test_a_picture_is_never_a_label(made: Dataset) -> None:
    image = made.tokenizer.specials["image"]
    source = BatchSource(
        made,
        seq_length=160,
        global_size=4,
        micro_size=1,
        data_parallel=1,
        packing=True,
        tokens_per_image=8,
        seed=0,
    )
    seen = 0
    for number in range(source.plan.num_packs):
        meta = source.sequence(0, number)
        batch = source.micro_batch((meta,))
        trained = batch.weights_BS > 0
        assert not (batch.labels_BS[trained] == image).any()
        assert meta.trained_tokens == trained.sum()
        seen += len(batch.images)
    assert seen > 10
    asked = made.spans[made.spans["role"] == Role.USER]
    assert len(asked) and asked["train"].all()


def test_deep_verification_knows_them(made: Dataset) -> None:
    assert verify_dataset(made.path, deep=True) == []
