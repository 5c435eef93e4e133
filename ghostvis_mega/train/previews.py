"""Held-out pictures with the question, the model's answer and the truth, while training."""

from collections.abc import Callable, Sequence

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.decode import GreedyDecoder, Prompt
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.train.feed import load_pixels
from ghostvis_mega.train.observers.base import Preview


def build_decoder(engine: TrainEngine, dataset: Dataset, *, rows: int) -> GreedyDecoder:
    """A decoder that reads pictures from `dataset` and speaks its tokenizer's language."""
    specials = dataset.tokenizer.specials
    vision = engine.run.model.vision
    size = vision.image_size if vision else 1
    return GreedyDecoder(
        engine,
        image_token=specials["image"],
        stop_token=specials["im_end"],
        vocab_size=dataset.tokenizer.vocab_size,
        load_pixels=lambda ids: load_pixels(dataset, ids, size=size, seeds=None),
        rows=rows,
    )


def answer_samples(
    decoder: GreedyDecoder,
    dataset: Dataset,
    samples: Sequence[int],
    *,
    max_new_tokens: int,
    progress: Callable[[str], None],
) -> list[tuple[str, str, str]]:
    """(question, the model's answer, the truth) of each sample; collective, equal on all ranks."""
    prompts, questions, truths = [], [], []
    for index in samples:
        tokens, image_ids, truth, question = dataset.prompt(index)
        prompts.append(Prompt(tokens=tuple(tokens.tolist()), image_ids=image_ids))
        questions.append(question)
        truths.append(truth)
    found = decoder.answers(prompts, max_new_tokens=max_new_tokens, progress=progress)
    answers = [dataset.tokenizer.decode(ids).strip() for ids in found]
    return list(zip(questions, answers, truths, strict=True))


class Previewer:
    """Asks the same held-out samples again and again, so that one sees the model learn.

    Args:
        engine: The model.
        dataset: Held-out samples.
        run: How many to show.
    """

    def __init__(self, engine: TrainEngine, dataset: Dataset, run: RunConfig):
        self.dataset = dataset
        count = min(run.log.preview_samples, dataset.num_samples)
        # Spread over the dataset by a step prime to usual groupings, so that pictures and questions
        # vary.
        self.samples = [index * dataset.num_samples // count for index in range(count)]
        self.decoder = build_decoder(
            engine, dataset, rows=max(1, count // engine.groups.degrees.data)
        )

    def look(self, *, progress: Callable[[str], None]) -> list[Preview]:
        """Answer the samples, telling `progress` of each round; collective."""
        rows = answer_samples(
            self.decoder, self.dataset, self.samples, max_new_tokens=16, progress=progress
        )
        return [
            Preview(
                images_png=tuple(
                    self.dataset.image_bytes(i) for i in self.dataset.sample(index).image_ids
                ),
                question=question,
                answer=answer,
                truth=truth,
            )
            for index, (question, answer, truth) in zip(self.samples, rows, strict=True)
        ]
