"""Chat templates: a conversation becomes tokens and spans; the loss mask comes from the spans.

ChatML, for example:

    <|im_start|>user\\n<|image|>What is it?<|im_end|>\\n<|im_start|>assistant\\nA cat.<|im_end|>\\n

Spans are taken while encoding, piece by piece, so the mask cannot drift from the text: trained is
exactly the assistant's text and the end token after it. Of a style whose name ends in `-turns` it
is the text of every role, with its end token; pictures and headers never are. A document is a
single turn of the role `text`; all of it is trained, and the end-of-text token after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghostvis_mega.data.layout import SPAN, Role
from ghostvis_mega.data.styles import STYLES, Piece, Special, Style
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError

TEMPLATE_NAME = "chatml"
"""Of datasets whose maker says nothing else."""

ROLES = ("system", "user", "assistant", "tool")
DOCUMENT = "text"
"""Role of the only turn of a document."""

MAX_TURNS = (1 << 15) - 1
MAX_IMAGES = (1 << 16) - 1

# A conversation is a walk: from each role, the roles that may follow.
_NEXT_ROLES = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class ImagePart:
    """A place for one image in a turn."""


@dataclass(frozen=True)
class Turn:
    """What one role says: text and images in reading order."""

    role: str
    parts: tuple[str | ImagePart, ...]

    @property
    def text(self) -> str:
        """The text parts joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def num_images(self) -> int:
        """Places for images in this turn."""
        return sum(isinstance(part, ImagePart) for part in self.parts)


class RowError(DataError):
    """A row that cannot become a sample; `reason` is the code that the ledger counts."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens (int32, one sentinel an image), spans and sentinel positions."""

    tokens: np.ndarray
    spans: np.ndarray
    image_positions: tuple[int, ...]

    @property
    def trained_mask(self) -> np.ndarray:
        """bool, one a token: under the loss."""
        mask = np.zeros(len(self.tokens), dtype=bool)
        for span in self.spans[self.spans["train"] != 0]:
            mask[span["start"] : span["start"] + span["len"]] = True
        mask[list(self.image_positions)] = False
        return mask


def check_conversation(turns: Sequence[Turn], *, num_images: int) -> None:
    """RowError with the first rule that a conversation breaks."""
    if not turns:
        raise RowError("empty_conversation", "the row has no turns")
    if len(turns) > MAX_TURNS:
        raise RowError("too_many_turns", f"{len(turns)} turns, at most {MAX_TURNS} are stored")
    if num_images > MAX_IMAGES:
        raise RowError("too_many_images", f"{num_images} images, at most {MAX_IMAGES} are stored")
    if len(turns) == 1 and turns[0].role == DOCUMENT:
        _check_document(turns[0], num_images=num_images)
        return
    previous = None
    for number, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise RowError(
                "unknown_role",
                f"turn {number} has role {turn.role!r}, not one of {', '.join(ROLES)}",
            )
        if turn.role not in _NEXT_ROLES[previous]:
            expected = " or ".join(_NEXT_ROLES[previous])
            raise RowError("role_order", f"turn {number} is {turn.role}, expected {expected}")
        if turn.role == "assistant":
            if turn.num_images:
                raise RowError(
                    "assistant_image", f"turn {number} puts an image into assistant text"
                )
            if not turn.text.strip():
                raise RowError("empty_answer", f"assistant turn {number} has no text")
        previous = turn.role
    if previous != "assistant":
        raise RowError("role_order", f"the last turn is {previous}, expected assistant")
    places = sum(turn.num_images for turn in turns)
    if places != num_images:
        raise RowError(
            "placeholder_count",
            f"{places} image placeholders in the text, {num_images} images in the row",
        )


def _check_document(turn: Turn, *, num_images: int) -> None:
    if turn.num_images or num_images:
        raise RowError("document_image", "a document holds text alone: use a conversation")
    if not turn.text.strip():
        raise RowError("empty_document", "the document has no text")


def find_style(name: str) -> Style:
    """The style called `name`; DataError naming all of them."""
    if name not in STYLES:
        raise DataError(f"there is no chat template {name!r}: use one of {', '.join(STYLES)}")
    return STYLES[name]


def load_tokenizer(path: Path, *, template: str = TEMPLATE_NAME) -> Tokenizer:
    """Load a tokenizer file with the special tokens of a template.

    Raises:
        DataError: the file is missing or damaged, or there is no such template.
    """
    return Tokenizer.load(path, pieces=find_style(template).pieces)


class ChatTemplate:
    """Encodes conversations and documents with one tokenizer, in one style."""

    def __init__(self, tokenizer: Tokenizer, name: str = TEMPLATE_NAME):
        self.name = name
        self._style = find_style(name)
        self._tokenizer = tokenizer
        missing = sorted(set(self._style.pieces) - set(tokenizer.specials))
        if missing:
            raise DataError(
                f"tokenizer {tokenizer.path} was loaded without {', '.join(missing)}, which the "
                f"chat template {name} writes: load it with that template"
            )
        ids = tokenizer.specials
        self._image, self._text_end = ids["image"], ids["endoftext"]
        style = self._style
        self._begin = self._ids(style.begin)
        self._headers = {role: self._ids(style.headers[role]) for role in ROLES}
        self._joined = None if style.joined_user is None else self._ids(style.joined_user)
        self._ends = {role: self._ids(style.ends[role]) for role in ROLES}

    def _ids(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, Special):
                ids.append(self._tokenizer.specials[piece.name])
            else:
                ids += self._tokenizer.encode(piece)
        return ids

    def encode(self, turns: Sequence[Turn], *, num_images: int) -> Encoded:
        """Tokens and spans of a conversation or document; RowError if it breaks a rule."""
        check_conversation(turns, num_images=num_images)
        if turns[0].role == DOCUMENT:
            text = [*self._begin, *self._encode_text(turns[0].text, 0), self._text_end]
            return self._document(text, begin=len(self._begin), ends=True)
        tokens = list(self._begin)
        spans: list[tuple[int, int, int, int, int]] = []
        image_positions: list[int] = []
        for number, turn in enumerate(turns):
            after_system = number > 0 and turns[number - 1].role == "system"
            tokens += self._header(turn.role, after_system=after_system)
            start = len(tokens)
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    image_positions.append(len(tokens))
                    tokens.append(self._image)
                else:
                    tokens += self._encode_text(part, number)
            train = int(turn.role in self._style.trained)
            spans.append((start, len(tokens) - start, Role[turn.role.upper()], train, number))
            if self._style.has_end_token(turn.role):
                spans.append((len(tokens), 1, Role.EOS, train, number))
            tokens += self._ends[turn.role]
        return Encoded(
            tokens=np.array(tokens, dtype=np.int32),
            spans=np.array(spans, dtype=SPAN),
            image_positions=tuple(image_positions),
        )

    def _header(self, role: str, *, after_system: bool) -> list[int]:
        joined = after_system and role == "user" and self._joined is not None
        return self._joined if joined else self._headers[role]

    def _document(self, tokens: list[int], *, begin: int, ends: bool) -> Encoded:
        spans = [(begin, len(tokens) - begin - int(ends), Role.TEXT, 1, 0)]
        if ends:
            spans.append((len(tokens) - 1, 1, Role.EOS, 1, 0))
        spans = [span for span in spans if span[1]]
        return Encoded(np.array(tokens, dtype=np.int32), np.array(spans, dtype=SPAN), ())

    def encode_split(
        self, turns: Sequence[Turn], *, num_images: int, max_tokens: int | None
    ) -> list[Encoded]:
        """As `encode`; a document of more than `max_tokens` is cut, a conversation never is.

        Each part but the last has exactly `max_tokens`; only the last has the end-of-text token.
        """
        whole = self.encode(turns, num_images=num_images)
        if turns[0].role != DOCUMENT or max_tokens is None:
            return [whole]
        return self._cut(whole.tokens.tolist(), max_tokens=max_tokens)

    def split_tokens(self, tokens: np.ndarray, *, max_tokens: int | None) -> list[Encoded]:
        """A document whose tokens are ready; RowError if they are not of this tokenizer."""
        size, ids = self._tokenizer.vocab_size, np.asarray(tokens, dtype=np.int64)
        if not len(ids):
            raise RowError("empty_document", "the document has no tokens")
        if ids.min() < 0 or ids.max() >= size:
            raise RowError("unknown_token", f"token {ids.max()} of a vocabulary of {size}")
        if (ids == self._image).any():
            raise RowError("document_image", "a document holds text alone: use a conversation")
        return self._cut(ids.tolist(), max_tokens=max_tokens or len(ids))

    def _cut(self, tokens: list[int], *, max_tokens: int) -> list[Encoded]:
        """Parts of `max_tokens`; what opens a document is not trained, all else is."""
        opened = len(self._begin) if tokens[: len(self._begin)] == self._begin else 0
        parts = []
        for start in range(0, len(tokens), max_tokens):
            part = tokens[start : start + max_tokens]
            ends = part[-1] == self._text_end
            parts.append(self._document(part, begin=0 if start else opened, ends=ends))
        return parts

    def prompt(self, question: str, *, num_images: int) -> list[int]:
        """Tokens of one user turn, images first, and the header that the answer follows."""
        images = [self._image] * num_images
        user = [*self._headers["user"], *images, *self._tokenizer.encode(question)]
        return [*self._begin, *user, *self._ends["user"], *self._headers["assistant"]]

    def _encode_text(self, text: str, turn: int) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except DataError as error:
            raise RowError("bad_text", f"turn {turn}: {error}") from error
