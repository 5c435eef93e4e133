"""Accuracy on held-out questions, each asked in a conversation of its own and answered by
generation."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.train.observers.base import plain_answer
from ghostvis_mega.train.previews import answer_samples, build_decoder

log = logging.getLogger(__name__)


def heldout_accuracy(
    engine: TrainEngine,
    dataset: Dataset,
    *,
    progress: Callable[[str], None],
    rows: int = 128,
    max_new_tokens: int = 8,
) -> float:
    """Share of all samples whose generated answer equals the reference; collective.

    Args:
        engine: The model.
        dataset: Held-out samples.
        progress: Told before each round of questions what is being done.
        rows: Conversations that one replica answers side by side.
        max_new_tokens: Longest answer; one that is cut off counts as wrong unless it is right so
            far.
    """
    decoder = build_decoder(engine, dataset, rows=rows)
    answered = answer_samples(
        decoder,
        dataset,
        range(dataset.num_samples),
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    right = sum(plain_answer(answer) == plain_answer(truth) for _, answer, truth in answered)
    return right / len(answered)


def question_only_accuracy(train: Dataset, heldout: Dataset) -> float:
    """What the best guess without looking at the picture reaches.

    For each question text the most frequent answer in `train`; unknown questions get its most
    frequent answer.
    """
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question, truth in _questions(train, range(train.num_samples)):
        seen[question][truth] += 1
    overall = sum(seen.values(), Counter())
    fallback = overall.most_common(1)[0][0]
    best = {question: counts.most_common(1)[0][0] for question, counts in seen.items()}
    asked = list(_questions(heldout, range(heldout.num_samples)))
    return sum(best.get(question, fallback) == truth for question, truth in asked) / len(asked)


def _questions(dataset: Dataset, samples: Sequence[int]):
    for index in samples:
        _, _, truth, question = dataset.prompt(index)
        yield plain_answer(question), plain_answer(truth)
