"""Prompts in, answers out: prefill, decoding in rows that are filled again when an answer ends.

Shape legend: B prompts, S padded length, H hidden.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.generate.decoder import Decoder
from ghostvis_mega.generate.kernels import Kernels
from ghostvis_mega.generate.memory import memory_told
from ghostvis_mega.generate.pictures import Picture, PictureEncoder
from ghostvis_mega.generate.rows import GPU_WINDOW, Rows
from ghostvis_mega.generate.sampling import Modes, Sampling, SamplingError

MAX_ROWS = 32
_PREFILL_TOKENS = 16_384
"""Positions of prompts that run side by side, padding included."""

FinishReason = Literal["stop", "length"]


class Codec(Protocol):
    """What text means to a model."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; special ones leave nothing behind."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights."""

    config: ModelConfig
    decoder: Decoder
    pictures: PictureEncoder | None = None
    """None for a model of text."""


@dataclass(frozen=True)
class Request:
    """One prompt."""

    tokens: tuple[int, ...]
    """One image token for each picture."""
    images: tuple[Picture, ...] = ()
    """In the order of their tokens; files are read when the prompt's turn comes."""
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Completion:
    """One answer."""

    tokens: tuple[int, ...]
    """With the end token, where one came."""
    logprobs: tuple[float, ...]
    """Of these tokens, under the model without temperature or any other option."""
    text: str
    """Without the end token and without a stop text."""
    finish_reason: FinishReason


OnText = Callable[[int, int, str, bool], None]
"""(request, answer of it, text so far, whether it is all)."""


def request_problem(
    request: Request, model: ModelConfig, *, image_token: int | None, vocab: int
) -> str | None:
    """A sentence if a model cannot be asked this; needs no weights."""
    if not request.tokens:
        return "the prompt is empty"
    if bad := [token for token in request.tokens if not 0 <= token < vocab]:
        return f"the prompt holds token {bad[0]}, the model has {vocab}"
    places = sum(token == image_token for token in request.tokens)
    if places != len(request.images):
        return f"the prompt has {places} places for images and {len(request.images)} came with it"
    if places and not model.tokens_per_image:
        return f"the prompt shows {places} images, but the model has no vision tower"
    length, most = expanded_length(request, model, image_token), model.llm.max_positions
    if length >= most:
        return (
            f"the prompt takes {length} positions, and the model has {most} for prompt and answer "
            "together (model.llm.max_positions)"
        )
    return None


def expanded_length(request: Request, model: ModelConfig, image_token: int | None) -> int:
    """Positions of a prompt with its pictures at full width."""
    places = sum(token == image_token for token in request.tokens) if request.images else 0
    return len(request.tokens) + places * (model.tokens_per_image - 1)


@dataclass(frozen=True)
class _Wave:
    """Answers to one request that begin together; they share a prefill."""

    request: int
    first: int
    """Number of the first of them among the request's n."""
    rows: list[int]


@dataclass
class _Answer:
    """One answer in the making."""

    request: int
    sample: int
    sampling: Sampling
    room: int
    """Most tokens."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    reason: FinishReason | None = None
    told: int = 0
    """Tokens of the text that was last reported."""

    def add(self, token: int, logprob: float, codec: Codec | None) -> None:
        """Take the next token; afterwards `reason` says whether it was the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        ends = codec is not None and token in codec.stop_tokens and not self.sampling.ignore_end
        if ends:
            self.reason = "stop"
        elif codec is not None and self.sampling.stop:
            text = codec.decode(self.tokens)
            places = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
            if places:
                self.reason, self.text = "stop", text[: min(places)]
        if self.reason is None and len(self.tokens) == self.room:
            self.reason = "length"

    def completion(self, codec: Codec | None) -> Completion:
        """The finished answer."""
        assert self.reason is not None
        text = self.text
        if text is None:
            text = "" if codec is None else codec.decode(self.tokens)
        return Completion(tuple(self.tokens), tuple(self.logprobs), text, self.reason)


class Engine:
    """A loaded model that answers.

    Args:
        loaded: It.
        codec: Text and end tokens; None for tokens alone.
        image_token: Stands for a picture in prompts.
        choices: Tokens that may come, where the tokenizer has fewer than the model.
        max_rows: Answers that are decoded side by side.
        window: Decoding steps between two looks for the end of answers; None: what suits the
            device.
        graphs: Record decoding steps as CUDA graphs; None: where there is a GPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        codec: Codec | None = None,
        image_token: int | None = None,
        choices: int | None = None,
        max_rows: int = MAX_ROWS,
        window: int | None = None,
        graphs: bool | None = None,
    ):
        self.model, self.decoder, self.pictures = loaded.config, loaded.decoder, loaded.pictures
        self.codec = codec
        self.image_token, self.max_rows = image_token, max_rows
        self.vocab = self.model.llm.vocab_tokens
        self.choices = min(choices or self.vocab, self.vocab)
        on_gpu = self.decoder.device.type == "cuda"
        self.window = window or (GPU_WINDOW if on_gpu else 1)
        self.graphs = on_gpu if graphs is None else graphs
        self._rows: Rows | None = None

    def use(self, kernels: Kernels, *, graphs: bool) -> None:
        """Decode with other kernels from now on; what was recorded is forgotten."""
        self.decoder.kernels, self.graphs, self._rows = kernels, graphs, None

    @memory_told()
    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], *, on_text: OnText | None = None
    ) -> list[list[Completion]]:
        """Answers to each request, `n` of them.

        Args:
            requests: Any mix of prompts and options.
            on_text: Told each time that there is more of an answer.

        Raises:
            SamplingError: A request that the model cannot be asked; says which and why.
            DataError: A picture that cannot be read.
            OutOfMemory: So many rows of such length do not fit.
        """
        for number, request in enumerate(requests):
            problem = request_problem(
                request, self.model, image_token=self.image_token, vocab=self.vocab
            )
            if problem:
                raise SamplingError(f"request {number}: {problem}")
        state = self._state(requests)
        # A call that an error ended may have left some running.
        state.stop(list(range(state.count)))
        waiting = deque((number, 0) for number in range(len(requests)))
        free = list(range(state.count))
        active: dict[int, _Answer] = {}
        done: list[dict[int, Completion]] = [{} for _ in requests]
        while waiting or active:
            admitted: list[_Wave] = []
            while waiting:
                number, first = waiting[0]
                left = requests[number].sampling.n - first
                count = min(left, state.count)
                if count > len(free):
                    break
                waiting.popleft()
                admitted.append(_Wave(number, first, free[:count]))
                free = free[count:]
                if count < left:
                    waiting.appendleft((number, first + count))
            active |= self._admit(state, requests, admitted)
            self._settle(state, active, free, done, on_text)
            if not active:
                continue
            modes = Modes.of([answer.sampling for answer in active.values()])
            tokens, logprobs = state.run(max(active) + 1, modes)
            for row, answer in active.items():
                for token, logprob in zip(tokens[row], logprobs[row], strict=True):
                    if answer.reason is None:
                        answer.add(token, logprob, self.codec)
            self._settle(state, active, free, done, on_text)
        return [[answers[sample] for sample in sorted(answers)] for answers in done]

    def _state(self, requests: Sequence[Request]) -> Rows:
        """Rows that are large enough; those of the last call, where they are."""
        most = self.model.llm.max_positions
        total = sum(request.sampling.n for request in requests)
        prompts = [self._length(request) for request in requests]
        rooms = [
            min(request.sampling.max_tokens, most - length)
            for request, length in zip(requests, prompts, strict=True)
        ]
        whole = (length + room for length, room in zip(prompts, rooms, strict=True))
        needed = {
            "rows": max(min(total, self.max_rows), 1),
            "length": max(whole, default=1),
            "draws": max(rooms, default=1),
        }
        if self._rows is None or not self._rows.fits(**needed):
            # The old rows' memory first: both may not fit.
            self._rows = None
            self._rows = Rows(
                self.decoder,
                **needed,
                vocab=self.vocab,
                choices=self.choices,
                window=self.window,
                graphs=self.graphs,
            )
        return self._rows

    def _length(self, request: Request) -> int:
        return expanded_length(request, self.model, self.image_token)

    def _admit(
        self, state: Rows, requests: Sequence[Request], admitted: list[_Wave]
    ) -> dict[int, _Answer]:
        """Prefill prompts, the similarly long together, and take the first tokens."""
        started: dict[int, _Answer] = {}
        order = sorted(admitted, key=lambda wave: self._length(requests[wave.request]))
        while order:
            # Sorted: the last of a group is its longest.
            size = 1
            while (
                size < len(order)
                and (size + 1) * self._length(requests[order[size].request]) <= _PREFILL_TOKENS
            ):
                size += 1
            started |= self._prefill(state, requests, order[:size])
            order = order[size:]
        return started

    def _prefill(
        self, state: Rows, requests: Sequence[Request], group: list[_Wave]
    ) -> dict[int, _Answer]:
        chosen = [requests[wave.request] for wave in group]
        lengths = [self._length(request) for request in chosen]
        hidden_BSH = self._embed(chosen, max(lengths))
        firsts = [wave.rows[0] for wave in group]
        hidden_BSH = self.decoder.prefill(hidden_BSH, state.cache, firsts)
        ends = torch.tensor(lengths, device=hidden_BSH.device) - 1
        prompts = torch.arange(len(group), device=hidden_BSH.device)
        scores_BV = self.decoder.logits(hidden_BSH[prompts, ends])
        places, rows, row_lengths, samplings, answers = [], [], [], [], []
        most = self.model.llm.max_positions
        for place, wave in enumerate(group):
            request, length, own = chosen[place], lengths[place], wave.rows
            if own[1:]:
                state.cache.copy_row(own[0], own[1:], length)
            for sample, row in enumerate(own, wave.first):
                places.append(place)
                rows.append(row)
                row_lengths.append(length)
                samplings.append((request.sampling, sample, list(request.tokens)))
                room = min(request.sampling.max_tokens, most - length)
                answers.append(_Answer(wave.request, sample, request.sampling, room))
        tokens, logprobs = state.start(rows, row_lengths, samplings, scores_BV[places])
        for answer, token, logprob in zip(answers, tokens, logprobs, strict=True):
            answer.add(token, logprob, self.codec)
        return dict(zip(rows, answers, strict=True))

    def _embed(self, requests: Sequence[Request], length: int) -> torch.Tensor:
        """Embeddings [B, S, H] of prompts with their pictures in place."""
        width = self.model.tokens_per_image
        pictures = [data for request in requests for data in request.images]
        encoded: list[torch.Tensor] = []
        if pictures:
            assert self.pictures is not None
            encoded = self.pictures(pictures)
        padded, slots = [], []
        for row, request in enumerate(requests):
            expanded: list[int] = []
            for token in request.tokens:
                shown = token == self.image_token
                if shown:
                    slots.append((row, len(expanded)))
                expanded += [token] * (width if shown else 1)
            padded.append(expanded + [0] * (length - len(expanded)))
        device = self.decoder.device
        hidden_BSH = self.decoder.embed(torch.tensor(padded, device=device))
        for (row, start), picture_TH in zip(slots, encoded, strict=True):
            hidden_BSH[row, start : start + width] = picture_TH.to(hidden_BSH.dtype)
        return hidden_BSH

    def _settle(
        self,
        state: Rows,
        active: dict[int, _Answer],
        free: list[int],
        done: list[dict[int, Completion]],
        on_text: OnText | None,
    ) -> None:
        """Report what came, and give back the rows of answers that have ended."""
        ended = [row for row, answer in active.items() if answer.reason is not None]
        for answer in active.values():
            if answer.reason is not None:
                done[answer.request][answer.sample] = answer.completion(self.codec)
            if on_text is not None and self.codec is not None and answer.told < len(answer.tokens):
                answer.told = len(answer.tokens)
                final = answer.reason is not None
                text = answer.text if answer.text is not None else self.codec.decode(answer.tokens)
                on_text(answer.request, answer.sample, text, final)
        for row in ended:
            del active[row]
        if ended:
            state.stop(ended)
            free += ended
            free.sort()
