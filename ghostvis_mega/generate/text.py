"""What a model's tokens mean: tokenizer, chat template and end tokens, as training or an export has
them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ghostvis_mega.convert.assets import Assets, find_assets
from ghostvis_mega.convert.hf_template import HFChat
from ghostvis_mega.data.template import ChatTemplate, ImagePart, RowError, Turn
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.generate.weights import is_native
from ghostvis_mega.utils.errors import CheckpointError, DataError

PLACEHOLDER = "<|image|>"
"""Marks a picture in prompts, whatever the model's own piece is."""
_ANSWER = "x"


class ModelText(ABC):
    """Text to tokens and back."""

    image_token: int | None
    stop_tokens: frozenset[int]
    size: int
    """Tokens that the tokenizer has."""

    @abstractmethod
    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of a conversation and the header that the next answer follows.

        Raises:
            DataError: It breaks a rule of the chat template.
        """

    @abstractmethod
    def plain(self, parts: Sequence[str | ImagePart]) -> list[int]:
        """Tokens of text to go on with, without a template."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; special ones leave nothing behind."""


def open_text(path: Path, assets: Assets) -> ModelText:
    """Tokenizer and template of a model.

    Args:
        path: The model.
        assets: Where they come from; nothing named: from the model's own directory.

    Raises:
        CheckpointError: Nothing is named, and the directory has none.
        DataError: The tokenizer or the dataset is damaged.
    """
    if assets.data is not None or assets.tokenizer is not None:
        found = find_assets(assets)
        assert found.tokenizer is not None
        return TrainingText(found.tokenizer, found.style, found.stops)
    if assets.folder is not None:
        return HuggingFaceText(assets.folder, borrowed=True)
    if is_native(path):
        raise CheckpointError(
            f"{path} is a checkpoint, which holds no tokenizer: name the data that it was trained "
            "on (--data NAME.gvd), a tokenizer file (--tokenizer), or a Hugging Face directory "
            "with one (--assets)"
        )
    return HuggingFaceText(path)


class TrainingText(ModelText):
    """A tokenizer of the data package and its chat template, token for token as in training."""

    def __init__(self, tokenizer: Tokenizer, style: str, stops: Sequence[int]):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, style)
        self.stop_tokens = frozenset(stops)
        self.image_token = tokenizer.specials["image"]
        self.size = tokenizer.vocab_size

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """What stands in front of the answer of a sample with these turns."""
        images = sum(turn.num_images for turn in turns)
        try:
            encoded = self._template.encode(
                [*turns, Turn("assistant", (_ANSWER,))], num_images=images
            )
        except RowError as error:
            raise DataError(f"the conversation cannot be asked: {error.detail}") from error
        answers = encoded.spans[encoded.spans["turn"] == len(turns)]
        return encoded.tokens[: int(answers["start"].min())].tolist()

    def plain(self, parts: Sequence[str | ImagePart]) -> list[int]:
        """Pieces one by one; none of them becomes a special token."""
        tokens: list[int] = []
        for part in parts:
            picture = isinstance(part, ImagePart)
            tokens += [self.image_token] if picture else self._tokenizer.encode(part)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """As the dataset's tokenizer does."""
        return self._tokenizer.decode(tokens)


class HuggingFaceText(ModelText):
    """`tokenizer.json` and the chat template of a Hugging Face directory.

    As everywhere in that world, text that looks like a special token becomes one.

    Args:
        folder: It.
        borrowed: It is not the model's own, so its settings need not name what ends an answer of
            the model: the token that ends one in its chat template does, as in an export.
    """

    def __init__(self, folder: Path, *, borrowed: bool = False):
        self._folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} holds no tokenizer.json: name the data (--data), a tokenizer file "
                "(--tokenizer) or another directory (--assets)"
            )
        # Checks the file: the library would raise what cannot be told apart.
        Tokenizer.load(file)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        found = find_assets(Assets(folder=folder))
        self.image_token, self._piece = found.tokens.get("image"), found.image_piece
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values())
        self._chat = HFChat(folder, self._tokenizer)
        stops = set(self._chat.stops())
        if borrowed and (end := self._chat.end_token()) is not None:
            stops.add(end)
        self.stop_tokens = frozenset(stops)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The chat template, rendered as stock programs do."""
        if self._chat.template is None:
            raise CheckpointError(
                f"{self._folder} holds no chat template: it is no chat model. --raw goes on with "
                "plain text"
            )
        text = self._chat.render([_message(turn) for turn in turns], answer_next=True)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def plain(self, parts: Sequence[str | ImagePart]) -> list[int]:
        """Text with what the tokenizer puts around it."""
        text = "".join(self._piece if isinstance(part, ImagePart) else part for part in parts)
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """As the library does."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as templates want it: plain text where there is no picture."""
    if not turn.num_images:
        return {"role": turn.role, "content": turn.text}
    content = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def split_prompt(text: str, *, num_images: int) -> tuple[str | ImagePart, ...]:
    """Text with its pictures: where the placeholder marks them, else in front.

    Raises:
        DataError: Not so many placeholders as pictures.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return (*(ImagePart() for _ in range(num_images)), text)
    if len(pieces) - 1 != num_images:
        raise DataError(
            f"the prompt has {len(pieces) - 1} times {PLACEHOLDER}, but {num_images} "
            f"image{'s' if num_images != 1 else ''} came with it"
        )
    parts: list[str | ImagePart] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [ImagePart(), piece]
    return tuple(part for part in parts if part != "")


class TextStream:
    """The part of a growing text that will not change any more, piece by piece.

    Args:
        stops: Texts that end an answer: what may be the beginning of one waits.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = stops
        self._shown = 0

    def more(self, text: str, *, final: bool) -> str:
        """What is new and sure, given the whole text so far."""
        end = len(text)
        if not final:
            # Bytes of a character that is not complete.
            end = len(text.rstrip("\ufffd"))
            for stop in self._stops:
                for size in range(min(len(stop) - 1, end), 0, -1):
                    if text[:end].endswith(stop[:size]):
                        end -= size
                        break
        found = text[self._shown : end] if end > self._shown else ""
        self._shown += len(found)
        return found


def parse_json_line(line: str, *, where: str) -> dict[str, Any]:
    """One line of a file of prompts.

    Raises:
        DataError: It is no JSON mapping.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is no JSON object")
    try:
        # What cannot be written beside its answer is no prompt.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a surrogate pair, which is no text") from error
    return value
