"""Questions about pictures that a checkpoint answers here and its export in transformers."""

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.divergence import load_model
from ghostvis_mega.convert.hf_config import GHOSTVIS_TYPE
from ghostvis_mega.convert.remote import code_files
from ghostvis_mega.convert.remote.configuration_ghostvis import GhostVisConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.generate.engine import Completion, Engine, Request
from ghostvis_mega.generate.load import load_model as load_weights
from ghostvis_mega.generate.pictures import picture_bytes
from ghostvis_mega.generate.sampling import Sampling
from ghostvis_mega.generate.text import ModelText, open_text
from ghostvis_mega.utils.errors import CheckpointError

LARGEST_ERROR = 1e-4
"""Of a log-probability in fp32; those of another checkpoint are thousands of times as far off."""


@dataclass(frozen=True)
class Answer:
    """What both say to one question."""

    question: str
    reference: str
    ours: str
    theirs: str
    same: bool
    """Token for token."""
    error: float
    """Greatest difference of a log-probability, over the tokens of our answer."""


@dataclass(frozen=True)
class _Asked:
    """A question as both read it."""

    request: Request
    question: str
    reference: str


def answer_both(
    checkpoint: Path, export: Path, data: Path, *, count: int, max_tokens: int = 8
) -> list[Answer]:
    """Answer questions about `count` different pictures greedily, in fp32 on the CPU.

    Args:
        checkpoint: Of a model with pictures.
        export: A directory made of it.
        data: Prepared dataset; its samples up to the last answer are the questions.
        count: Number of pictures; fewer where the dataset has fewer.
        max_tokens: Longest answer.

    Raises:
        CheckpointError: One of them is no sound model, transformers does not find every tensor, or
            the directory brings other code than this version writes.
    """
    _check_code(export)
    dataset = Dataset.open(data)
    asked = list(_questions(dataset, count, max_tokens))
    if not asked:
        raise CheckpointError(f"{data} holds no question about a picture")
    text = open_text(checkpoint, Assets(data=data))
    ours = _ours(checkpoint, text, asked)
    theirs = _Stock(export, stops=text.stop_tokens)
    found = []
    for item, completion in zip(asked, ours, strict=True):
        tokens, error = theirs.answer(item, completion)
        found.append(
            Answer(
                question=item.question,
                reference=item.reference,
                ours=dataset.tokenizer.decode(completion.tokens),
                theirs=dataset.tokenizer.decode(tokens),
                same=tokens == list(completion.tokens),
                error=error,
            )
        )
    return found


def _check_code(export: Path) -> None:
    """Code in a directory is not run; ours is, if it is the same."""
    for path in sorted(export.glob("*.py")):
        if code_files().get(path.name) != path.read_text(encoding="utf-8"):
            raise CheckpointError(
                f"{path} is not the code that this version writes, and is not run. Export again"
            )


def _questions(dataset: Dataset, count: int, max_tokens: int) -> Iterator[_Asked]:
    seen: set[int] = set()
    step = max(1, dataset.num_samples // max(1, count))
    # Spread over the dataset first; what is left of the count comes from the rest of it.
    order = dict.fromkeys([*range(0, dataset.num_samples, step), *range(dataset.num_samples)])
    for index in order:
        if len(seen) == count:
            return
        tokens, image_ids, reference, question = dataset.prompt(index)
        if len(image_ids) != 1 or image_ids[0] in seen:
            continue
        seen.add(image_ids[0])
        request = Request(
            tokens=tuple(tokens),
            images=(dataset.image_bytes(image_ids[0]),),
            sampling=Sampling(max_tokens=max_tokens),
        )
        yield _Asked(request, question, reference)


def _ours(checkpoint: Path, text: ModelText, asked: list[_Asked]) -> list[Completion]:
    loaded = load_weights(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    engine = Engine(loaded, codec=text, image_token=text.image_token)
    return [answers[0] for answers in engine.generate([item.request for item in asked])]


class _Stock:
    """transformers' model and processor of an export."""

    def __init__(self, export: Path, *, stops: Collection[int]):
        from transformers import AutoConfig, LlavaProcessor

        # So that nothing asks whether to run the directory's own code.
        AutoConfig.register(GHOSTVIS_TYPE, GhostVisConfig, exist_ok=True)
        self.model, self.stops = load_model(export), sorted(stops)
        self.processor = LlavaProcessor.from_pretrained(export)

    @torch.no_grad()
    def answer(self, item: _Asked, ours: Completion) -> tuple[list[int], float]:
        """Tokens of its own answer, and how far its log-probabilities of our tokens are off."""
        content = [{"type": "image"}, {"type": "text", "text": item.question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        picture = Image.open(io.BytesIO(picture_bytes(item.request.images[0])))
        inputs = self.processor(text=text, images=[picture], return_tensors="pt")
        self._check_prompt(item, inputs["input_ids"][0].tolist())
        length = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs,
            max_new_tokens=item.request.sampling.max_tokens,
            do_sample=False,
            eos_token_id=self.stops,
        )
        answer = torch.tensor([ours.tokens])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        scores = self.model(**inputs).logits[0, length - 1 : -1].log_softmax(dim=-1)
        wanted = torch.tensor(ours.logprobs)
        error = (scores.gather(1, answer.T).flatten() - wanted).abs().max()
        return out[0, length:].tolist(), float(error)

    def _check_prompt(self, item: _Asked, theirs: list[int]) -> None:
        """Their chat template and tokenizer must give what training read."""
        config = self.model.config
        width = config.image_seq_length
        ours: list[int] = []
        for token in item.request.tokens:
            ours += [token] * (width if token == config.image_token_id else 1)
        if ours != theirs:
            raise CheckpointError(
                f"the chat template of the export makes {theirs[:12]}... of {item.question!r}, "
                f"training reads {ours[:12]}...: name data of single questions, prepared with the "
                "model's tokenizer and template"
            )
