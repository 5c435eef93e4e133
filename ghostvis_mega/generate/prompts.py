"""Prompts as people write them become requests; all that can be wrong is told before a model is
loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.data.pixels import probe
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.generate.engine import Completion, Request, request_problem
from ghostvis_mega.generate.pictures import picture_bytes
from ghostvis_mega.generate.sampling import Sampling, SamplingError
from ghostvis_mega.generate.text import ModelText, parse_json_line, split_prompt
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import read_small

LARGEST_INPUT = 1 << 30
"""Bytes of a file of prompts."""
_OPTIONS = {field.name for field in fields(Sampling)} - {"ignore_end"}
_KEYS = {"prompt", "messages", "images", "system", "id"} | _OPTIONS


@dataclass(frozen=True)
class Prompt:
    """One prompt with its pictures' files."""

    where: str
    """For sentences: `--prompt`, or a file and line."""
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]
    sampling: Sampling
    asked: Mapping[str, Any]
    """What the user wrote, to be written beside the answers."""


def make_prompt(
    text: str,
    *,
    images: Sequence[Path],
    system: str | None,
    sampling: Sampling,
    where: str = "--prompt",
) -> Prompt:
    """A question of one turn.

    Raises:
        DataError: Placeholders and pictures do not match.
    """
    try:
        parts = split_prompt(text, num_images=len(images))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    turns = [Turn("user", parts)]
    if system is not None:
        turns.insert(0, Turn("system", (system,)))
    asked = {"prompt": text, "images": [str(path) for path in images]}
    return Prompt(where, tuple(turns), tuple(images), sampling, asked)


def read_prompts(path: Path, *, system: str | None, sampling: Sampling) -> Iterator[Prompt]:
    """Prompts of a JSONL file; pictures are named relative to it.

    A line holds `prompt` (or `messages`, as chat programs have them), `images`, and any sampling
    option that is to differ.

    Raises:
        DataError: The file cannot be read or a line is broken; names it.
    """
    try:
        # At line feeds alone: JSON texts may hold the other ends of lines that Python knows.
        lines = read_small(path, limit=LARGEST_INPUT).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            found += 1
            where = f"{path}, line {number}"
            yield _from_row(parse_json_line(line, where=where), path, where, system, sampling)
    if not found:
        raise DataError(f"{path} holds no prompts")


def _from_row(
    row: dict[str, Any], path: Path, where: str, system: str | None, sampling: Sampling
) -> Prompt:
    if unknown := sorted(row.keys() - _KEYS):
        raise DataError(f"{where}: {unknown[0]!r} is unknown; known are {', '.join(sorted(_KEYS))}")
    if ("prompt" in row) == ("messages" in row):
        raise DataError(f"{where}: give one of prompt and messages")
    images = row.get("images", [])
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise DataError(f"{where}: images is no list of file names")
    files = tuple(path.parent / name for name in images)
    options = {key: row[key] for key in row.keys() & _OPTIONS}
    if isinstance(stop := options.get("stop"), list | str):
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    try:
        sampling = replace(sampling, **options)
    except SamplingError as error:
        raise DataError(f"{where}: {error}") from error
    own = row.get("system", system)
    if own is not None and not isinstance(own, str):
        raise DataError(f"{where}: system is {own!r}, but it must be a text")
    if "messages" in row:
        if own is not None:
            raise DataError(
                f"{where}: a system text beside messages has no place: make it their first message"
            )
        turns = _turns(row["messages"], where=where)
        if sum(turn.num_images for turn in turns) != len(files):
            raise DataError(
                f"{where}: messages show {sum(turn.num_images for turn in turns)} images, "
                f"{len(files)} came with them"
            )
        return Prompt(where, turns, files, sampling, row)
    if not isinstance(row["prompt"], str):
        raise DataError(f"{where}: prompt is {row['prompt']!r}, but it must be a text")
    made = make_prompt(row["prompt"], images=files, system=own, sampling=sampling, where=where)
    return replace(made, asked=row)


def _turns(messages: Any, *, where: str) -> tuple[Turn, ...]:
    """Turns of messages whose content is text or parts of type `text` and `image`."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is no list")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: a message is no object with a role")
        content = message.get("content")
        if isinstance(content, str):
            turns.append(Turn(message["role"], (content,)))
            continue
        parts: list[str | ImagePart] = []
        for part in content if isinstance(content, list) else [None]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                parts.append(ImagePart())
            elif kind == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                raise DataError(f"{where}: content is neither text nor parts of text and images")
        turns.append(Turn(message["role"], tuple(parts)))
    return tuple(turns)


def make_requests(
    prompts: Sequence[Prompt], text: ModelText, model: ModelConfig, *, raw: bool
) -> list[Request]:
    """Requests for a model of these settings, with the files of their pictures.

    Args:
        prompts: What is asked.
        text: Of the model.
        model: Its settings.
        raw: Go on with the text of the only turn, without a chat template.

    Raises:
        DataError: A picture is missing or broken, or a prompt does not fit; names it.
    """
    requests = []
    checked: set[Path] = set()
    for prompt in prompts:
        if raw and len(prompt.turns) != 1:
            raise DataError(f"{prompt.where}: --raw takes text alone, no system and no messages")
        # Before the template: those of text models know no pictures, each fails in its own way.
        if prompt.images and not model.tokens_per_image:
            raise DataError(
                f"{prompt.where}: {len(prompt.images)} image{'s'[: len(prompt.images) > 1]} came "
                "with the prompt, but the model has no vision tower"
            )
        try:
            tokens = text.plain(prompt.turns[0].parts) if raw else text.prompt(prompt.turns)
        except DataError as error:
            raise DataError(f"{prompt.where}: {error}") from error
        for path in prompt.images:
            if path not in checked:
                read_picture(path, prompt.where)
                checked.add(path)
        request = Request(tuple(tokens), prompt.images, prompt.sampling)
        problem = request_problem(
            request, model, image_token=text.image_token, vocab=model.llm.vocab_tokens
        )
        if problem:
            raise DataError(f"{prompt.where}: {problem}")
        requests.append(request)
    return requests


def read_picture(path: Path, where: str) -> bytes:
    """A picture's bytes, decoded once to be sure.

    Raises:
        DataError: It is missing or broken; begins with `where`.
    """
    try:
        data = picture_bytes(path)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    try:
        probe(data)
    except DataError as error:
        raise DataError(f"{where}: image {path} cannot be used: {error}") from error
    return data


def answer_row(
    prompt: Prompt, completions: Sequence[Completion], *, with_tokens: bool
) -> dict[str, Any]:
    """What is written of a prompt's answers."""
    rows = []
    for completion in completions:
        row: dict[str, Any] = {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.tokens),
        }
        if with_tokens:
            row |= {"tokens": completion.tokens, "logprobs": completion.logprobs}
        rows.append(row)
    return {**prompt.asked, "completions": rows}
