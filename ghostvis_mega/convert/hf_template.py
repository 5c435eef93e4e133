"""Chat templates of Hugging Face directories: where they are, what they render, what ends an
answer in them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ghostvis_mega.convert.hf_folder import CONFIG, read_json
from ghostvis_mega.utils.errors import DataError

GENERATION = "generation_config.json"
_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the expressions of a template can raise, beside the template language's own errors."""
_QUESTION, _ANSWER = "ghostvis question", "ghostvis answer"


class HFChat:
    """Chat template and end tokens of a directory.

    Args:
        folder: It.
        tokenizer: Its own; templates see specials by name, not the vocabulary, so None will do.
    """

    def __init__(self, folder: Path, tokenizer: tokenizers.Tokenizer | None = None):
        from transformers import PreTrainedTokenizerFast

        self.folder = folder
        self._settings = optional_json(folder / "tokenizer_config.json")
        specials = {
            f"{name}_token": _content(self._settings.get(f"{name}_token"))
            for name in ("bos", "eos")
        }
        self._jinja = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer or tokenizers.Tokenizer(tokenizers.models.BPE()),
            **{name: piece for name, piece in specials.items() if piece},
        )

    @cached_property
    def template(self) -> str | None:
        """The template's text.

        Raises:
            DataError: Its file cannot be read.
        """
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file} cannot be read: {error}") from error
        value = optional_json(self.folder / "chat_template.json").get("chat_template")
        value = value or self._settings.get("chat_template")
        if isinstance(value, list):  # several with names
            rows = [item for item in value if isinstance(item, dict)]
            value = {row.get("name"): row.get("template") for row in rows}.get("default")
        return value if isinstance(value, str) else None

    def render(self, messages: Sequence[dict[str, Any]], *, answer_next: bool) -> str:
        """What stock programs make of messages.

        Args:
            messages: With a role, and content of text or of parts.
            answer_next: End with the header that an answer follows.

        Raises:
            DataError: The template fails.
        """
        import jinja2

        try:
            rendered: str = self._jinja.apply_chat_template(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=answer_next,
                tokenize=False,
            )
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise DataError(
                f"{self.folder}: its chat template fails: {error or type(error).__name__}"
            ) from error
        return rendered

    def picture_problem(self, piece: str) -> str | None:
        """Why a question about one picture would not hold its placeholder; None: it does."""
        if self.template is None:
            return f"{self.folder} holds no chat template"
        content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
        try:
            text = self.render([{"role": "user", "content": content}], answer_next=True)
        except DataError as error:
            return str(error)
        if (found := text.count(piece)) == 1 and _QUESTION in text:
            return None
        return (
            f"{self.folder}: its chat template makes {found} times {piece} of a picture and a text"
        )

    def end_token(self) -> int | None:
        """The special that the template puts right behind an answer, where it is one.

        Raises:
            DataError: The template fails on a question and its answer, or leaves the answer out.
        """
        if self.template is None:
            return None
        problem = f"{self.folder}: its chat template leaves the answer out"
        # Some know text alone, others parts alone.
        for parts in (False, True):
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
                for role, text in (("user", _QUESTION), ("assistant", _ANSWER))
            ]
            try:
                text = self.render(messages, answer_next=False)
            except DataError as error:
                problem = str(error)
                continue
            _, found, behind = text.rpartition(_ANSWER)
            if found:
                ends = [(p, i) for p, i in self._specials() if behind.lstrip().startswith(p)]
                return max(ends, key=lambda end: len(end[0]))[1] if ends else None
        raise DataError(problem)

    def _specials(self) -> Iterator[tuple[str, int]]:
        """Pieces and ids, where the directory's files tell them."""
        told = optional_json(self.folder / "tokenizer.json").get("added_tokens")
        if isinstance(told, list):
            rows = [(row.get("id"), row) for row in told if isinstance(row, dict)]
        else:
            told = self._settings.get("added_tokens_decoder")
            rows = list(told.items()) if isinstance(told, dict) else []
        for number, row in rows:
            piece = _content(row)
            if piece and str(number).isdecimal():
                yield piece, int(number)

    def stops(self) -> list[int]:
        """End tokens as the directory's settings name them."""
        config = read_json(self.folder / CONFIG)
        for source in (
            optional_json(self.folder / GENERATION),
            config,
            config.get("text_config") or {},
        ):
            value = source.get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            if values and all(isinstance(token, int) for token in values):
                return values
        return []


def optional_json(path: Path) -> dict[str, Any]:
    """A file's settings; none where it is not there."""
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token as settings have it: text, or a mapping that holds it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
