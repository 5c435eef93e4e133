"""Scores against counts by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.template import Turn
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer
from ghostvis_mega.engine.decode import Prompt
from ghostvis_mega.eval import vqa
from ghostvis_mega.eval.vqa import heldout_accuracy, plain_answer, question_only_accuracy

WORDS = ["what color is it?", "is it red?", "how many?", "yes no red blue Red. two 3 YES", "user"]

TRAIN = [
    ("what color is it?", "red"),
    ("what color is it?", "blue"),
    ("what color is it?", "Red."),
    ("Is it red?", "no"),
    ("is it red?", "no"),
    ("is it red?", "yes"),
    ("is it red?", "no"),
]
"""Most frequent: red for the colour, no for the other question and over all."""

HELDOUT = [
    ("what color is it?", "red"),  # right
    ("what color is it?", "blue"),
    ("WHAT color is it?", "RED"),  # right
    ("is it red?", "no."),  # right
    ("is it red?", "yes"),
    ("how many?", "no"),  # right: never seen in training, so the most frequent answer
    ("how many?", "two"),
    ("how many?", "3"),
]

Build = Callable[[str, Sequence[tuple[str, str]]], Dataset]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    letters = ["system assistant tool", "WHAT RED Is YES."]
    return train_tokenizer(WORDS + letters, vocab_size=300, path=tmp_path / "tokenizer.model")


@pytest.fixture
def build(tokenizer: Tokenizer, tmp_path: Path) -> Build:
    """A dataset of questions and answers."""

    def _build(name: str, asked: Sequence[tuple[str, str]]) -> Dataset:
        rows = [
            Row(
                key=f"{name}/{number}",
                turns=(Turn("user", (question,)), Turn("assistant", (answer,))),
                answers=(answer,),
            )
            for number, (question, answer) in enumerate(asked)
        ]
        ingest([Source(name, rows)], tokenizer=tokenizer, path=tmp_path / f"{name}.gvd")
        return Dataset.open(tmp_path / f"{name}.gvd")

    return _build


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  red. ", "red"),
        ("Red .", "red"),
        ("a.b", "a.b"),
        ("3.5.", "3.5"),
        ("STRASSE", "strasse"),
        ("", ""),
        (".", ""),
        ("no..", "no."),
    ],
)
def test_plain_answer(answer: str, expected: str) -> None:
    assert plain_answer(answer) == expected


def test_the_question_alone(build: Build) -> None:
    train, heldout = build("train", TRAIN), build("heldout", HELDOUT)
    assert question_only_accuracy(train, heldout) == 4 / 8
    # On its own questions the best guess is right as often as its answer is there.
    assert question_only_accuracy(train, train) == 5 / 7
    # Another training split would answer the colour with blue.
    bluer = build("bluer", [*TRAIN, *[("what color is it?", "blue")] * 3])
    # Blue is then the most frequent answer over all, too.
    assert question_only_accuracy(bluer, heldout) == 2 / 8


class Answers:
    """Stands in for a decoder: gives what it was told to, and remembers the prompts."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, texts
        self.prompts: list[Prompt] = []

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        progress: Callable[[str], None],
    ) -> list[list[int]]:
        progress(f"{len(prompts)} prompts")
        self.prompts += prompts
        return [self.tokenizer.encode(text)[:max_new_tokens] for text in self.texts]


def test_heldout_accuracy_counts_every_question_once(
    build: Build, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = build("heldout", HELDOUT)
    spoken = ["Red", "red", "red.", "no", "yes no", "", "TWO", "3"]
    decoder = Answers(tokenizer, spoken)
    monkeypatch.setattr(vqa, "build_decoder", lambda *_, rows: decoder)
    engine, told = SimpleNamespace(), []
    right = [True, False, True, True, False, False, True, True]
    assert heldout_accuracy(engine, heldout, progress=told.append) == sum(right) / len(right)
    assert told == ["8 prompts"] and len(decoder.prompts) == heldout.num_samples
    for prompt, (question, answer) in zip(decoder.prompts, HELDOUT, strict=True):
        text = tokenizer.decode(list(prompt.tokens))
        assert question in text and text.endswith("assistant\n")
        assert answer not in text.removeprefix("user").replace(question, "")
    decoder.texts = [truth for _, truth in HELDOUT]
    assert heldout_accuracy(engine, heldout, progress=told.append) == 1.0
    decoder.texts = ["?"] * len(HELDOUT)
    assert heldout_accuracy(engine, heldout, progress=told.append) == 0.0
