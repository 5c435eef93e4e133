"""ChatML: a conversation becomes tokens and spans; the loss mask comes from the spans.

    <|im_start|>user\\n<|image|>What is it?<|im_end|>\\n<|im_start|>assistant\\nA cat.<|im_end|>\\n

Spans are taken while encoding, piece by piece, so the mask cannot drift from the text: trained is
exactly the assistant's text and the end token after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.data.layout import SPAN, Role
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError

TEMPLATE_NAME = "chatml"
ROLES = ("system", "user", "assistant", "tool")
MAX_TURNS = 1 << 15
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
        return mask


def check_conversation(turns: Sequence[Turn], *, num_images: int) -> None:
    """RowError with the first rule that a conversation breaks."""
    if not turns:
        raise RowError("empty_conversation", "the row has no turns")
    if len(turns) > MAX_TURNS:
        raise RowError("too_many_turns", f"{len(turns)} turns, at most {MAX_TURNS} are stored")
    if num_images > MAX_IMAGES:
        raise RowError("too_many_images", f"{num_images} images, at most {MAX_IMAGES} are stored")
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


class ChatTemplate:
    """Encodes conversations with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        ids = tokenizer.specials
        self._im_end, self._image = ids["im_end"], ids["image"]
        self._line_end = tokenizer.encode("\n")
        self._headers = {role: [ids["im_start"], *tokenizer.encode(f"{role}\n")] for role in ROLES}

    def encode(self, turns: Sequence[Turn], *, num_images: int) -> Encoded:
        """Tokens and spans of a checked conversation; RowError if it breaks a rule."""
        check_conversation(turns, num_images=num_images)
        tokens: list[int] = []
        spans: list[tuple[int, int, int, int, int]] = []
        image_positions: list[int] = []
        for number, turn in enumerate(turns):
            tokens += self._headers[turn.role]
            start = len(tokens)
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    image_positions.append(len(tokens))
                    tokens.append(self._image)
                else:
                    tokens += self._encode_text(part, number)
            train = int(turn.role == "assistant")
            spans.append((start, len(tokens) - start, Role[turn.role.upper()], train, number))
            spans.append((len(tokens), 1, Role.EOS, train, number))
            tokens += [self._im_end, *self._line_end]
        return Encoded(
            tokens=np.array(tokens, dtype=np.int32),
            spans=np.array(spans, dtype=SPAN),
            image_positions=tuple(image_positions),
        )

    def prompt(self, question: str, *, num_images: int) -> list[int]:
        """Tokens of one user turn, images first, and the header that the answer follows."""
        images = [self._image] * num_images
        user = [*self._headers["user"], *images, *self._tokenizer.encode(question)]
        return [*user, self._im_end, *self._line_end, *self._headers["assistant"]]

    def _encode_text(self, text: str, turn: int) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except DataError as error:
            raise RowError("bad_text", f"turn {turn}: {error}") from error
