"""How the next token is chosen: greedy, or drawn after temperature, top-k, top-p and min-p.

A row's draws are numbers that its seed alone decides, made before it starts, and a token is where
the number falls on the cumulative probabilities in the order of the vocabulary. So a seed gives the
same tokens beside any neighbours and on any device, as far as the scores are the same.

Shape legend: R rows, V vocabulary, M most tokens of an answer.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ghostvis_mega.utils.errors import GhostVisError

_BITS = 32


LEAST, MOST = 1e-6, 1e6
"""Of numbers that scores are divided by: beyond them fp32 has no sound quotient."""
_WHOLE = ("max_tokens", "top_k", "seed", "n")
_REAL = ("temperature", "top_p", "min_p", "repetition_penalty")


class SamplingError(GhostVisError, ValueError):
    """A sampling option that cannot be."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of one request.

    Args:
        max_tokens: Longest answer.
        temperature: Scores are divided by it before a draw; 0 takes the best token.
        top_k: Draw from the k best alone; 0 for all.
        top_p: Draw from the fewest best tokens whose probabilities reach p together.
        min_p: Draw from tokens that are at least so probable as this share of the best one.
        repetition_penalty: Scores of tokens of the prompt and the answer are divided by it where
            positive, multiplied where negative.
        seed: Decides the draws.
        n: Answers to the one prompt.
        stop: Texts that end an answer and are not part of it.
        ignore_end: Go on after the end token, for measuring.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_end: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        for name, good, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature == 0 or LEAST <= self.temperature <= MOST,
                f"0 (the best token) or from {LEAST:g} to {MOST:g}",
            ),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                LEAST <= self.repetition_penalty <= MOST,
                f"from {LEAST:g} to {MOST:g} (1 changes nothing)",
            ),
            ("seed", self.seed >= 0, "0 or more"),
            ("n", self.n >= 1, "at least 1"),
            ("stop", all(self.stop), "of texts that are not empty"),
        ):
            if not good:
                raise SamplingError(f"{name}={getattr(self, name)!r} cannot be: it must be {rule}")

    def _check_types(self) -> None:
        """What comes from a file may be anything; True is no number here."""
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) for text in self.stop)
        kinds = {
            **dict.fromkeys(_WHOLE, (int, "a whole number")),
            **dict.fromkeys(_REAL, (int | float, "a number")),
        }
        checks = [
            (name, isinstance(value := getattr(self, name), kind) and value is not True
             and value is not False, rule)
            for name, (kind, rule) in kinds.items()
        ]  # fmt: skip
        checks.append(("stop", texts, "a text or a list of texts"))
        checks.append(("ignore_end", isinstance(self.ignore_end, bool), "true or false"))
        for name, good, rule in checks:
            if not good:
                raise SamplingError(f"{name}={getattr(self, name)!r} cannot be: it must be {rule}")

    def draws(self, sample: int, count: int) -> torch.Tensor:
        """The first numbers in [0, 1), float64 [count], of one of the n answers."""
        bits = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, sample])))
        # Of few enough bits that no product with a sum of probabilities rounds up to the sum.
        drawn = bits.integers(0, 1 << _BITS, count, dtype=np.uint64)
        return torch.from_numpy(drawn.astype(np.float64) / (1 << _BITS))


@dataclass(frozen=True)
class Modes:
    """What the rows of a batch need; what none needs is not computed."""

    draws: bool = False
    orders: bool = False
    """Some row has top-k or top-p, which need the scores in order."""
    penalises: bool = False

    @classmethod
    def of(cls, requests: list[Sampling]) -> "Modes":
        """The needs of all of these."""
        drawn = [s for s in requests if s.temperature > 0]
        return cls(
            draws=bool(drawn),
            orders=any(s.top_k > 0 or s.top_p < 1 for s in drawn),
            penalises=any(s.repetition_penalty != 1 for s in requests),
        )


class RowOptions:
    """Options of each row as tensors, which kernels that are already recorded can read.

    Args:
        rows: Number of rows.
        length: Draws a row can take.
        vocab: Tokens to choose from: the first ones of the model's vocabulary.
        device: Where they are.
    """

    def __init__(self, rows: int, *, length: int, vocab: int, device: torch.device):
        self.temperature_R = torch.zeros(rows, device=device)
        self.top_k_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top_p_R = torch.ones(rows, device=device)
        self.min_p_R = torch.zeros(rows, device=device)
        self.penalty_R = torch.ones(rows, device=device)
        self.draws_RM = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.seen_RV = torch.zeros(rows, vocab, dtype=torch.bool, device=device)

    def set(self, row: int, sampling: Sampling, *, sample: int, prompt: list[int]) -> None:
        """Fill a row for one answer."""
        device = self.top_k_R.device
        self.temperature_R[row] = sampling.temperature
        vocab = self.seen_RV.shape[1]
        self.top_k_R[row] = min(sampling.top_k or vocab, vocab)
        # Above 0 in fp32 as well, or not even the best token would be left.
        self.top_p_R[row] = max(sampling.top_p, torch.finfo(torch.float32).tiny)
        self.min_p_R[row] = sampling.min_p
        self.penalty_R[row] = sampling.repetition_penalty
        count = min(sampling.max_tokens, self.draws_RM.shape[1])
        self.draws_RM[row, :count] = sampling.draws(sample, count).to(device)
        self.seen_RV[row] = False
        if sampling.repetition_penalty != 1:
            # A prompt may hold tokens that cannot be chosen.
            seen = [token for token in prompt if token < vocab]
            self.seen_RV[row, torch.tensor(seen, dtype=torch.int64, device=device)] = True

    def rows(self, chosen: slice | list[int]) -> "RowOptions":
        """Some rows; of a slice the same memory."""
        view = object.__new__(RowOptions)
        for name, value in vars(self).items():
            setattr(view, name, value[chosen])
        return view


def choose(
    scores_RV: torch.Tensor, steps_R: torch.Tensor, options: RowOptions, modes: Modes
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-probability under the model as it is.

    Args:
        scores_RV: fp32, of all tokens that the model knows.
        steps_R: int64, how many tokens a row has drawn.
        options: Of these rows.
        modes: What they need.

    Returns:
        int64 [R], fp32 [R]. The log-probability is that of the scores alone: no temperature, no
        penalty, nothing left out.
    """
    # The vocabulary may be larger than what means something to the tokenizer.
    changed_RV = scores_RV[:, : options.seen_RV.shape[1]]
    if modes.penalises:
        changed_RV = _penalised(changed_RV, options)
    tokens_R = changed_RV.argmax(dim=-1)
    if modes.draws:
        drawn_R = _draw(changed_RV, steps_R, options, orders=modes.orders)
        tokens_R = torch.where(options.temperature_R > 0, drawn_R, tokens_R)
    chosen_R = scores_RV.gather(1, tokens_R[:, None])[:, 0]
    return tokens_R, chosen_R - torch.logsumexp(scores_RV, dim=-1)


def _penalised(scores_RV: torch.Tensor, options: RowOptions) -> torch.Tensor:
    penalty_R1 = options.penalty_R[:, None]
    less = torch.where(scores_RV > 0, scores_RV / penalty_R1, scores_RV * penalty_R1)
    return torch.where(options.seen_RV, less, scores_RV)


def _draw(
    scores_RV: torch.Tensor, steps_R: torch.Tensor, options: RowOptions, *, orders: bool
) -> torch.Tensor:
    # A row that takes the best token is computed along and not used.
    temperature_R1 = options.temperature_R.masked_fill(options.temperature_R == 0, 1.0)[:, None]
    scores_RV = scores_RV / temperature_R1
    if orders:
        scores_RV = _best_only(scores_RV, options)
    p_RV = torch.softmax(scores_RV, dim=-1)
    floor_R1 = options.min_p_R[:, None] * p_RV.amax(dim=-1, keepdim=True)
    p_RV = p_RV.masked_fill(p_RV < floor_R1, 0.0)
    sums_RV = p_RV.double().cumsum(dim=-1)
    draws_R1 = options.draws_RM.gather(1, steps_R[:, None])
    found_R1 = torch.searchsorted(sums_RV, draws_R1 * sums_RV[:, -1:], right=True)
    return found_R1[:, 0]


def _best_only(scores_RV: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """-inf where top-k, or after it top-p, leaves a token out."""
    sorted_RV, order_RV = scores_RV.sort(dim=-1, descending=True, stable=True)
    places_V = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    out_RV = places_V >= options.top_k_R[:, None]
    p_RV = torch.softmax(sorted_RV.masked_fill(out_RV, float("-inf")), dim=-1)
    # A token stays while those before it have not reached p; the best always does.
    before_RV = p_RV.double().cumsum(dim=-1) - p_RV.double()
    out_RV = out_RV | ((before_RV >= options.top_p_R[:, None]) & (options.top_p_R < 1)[:, None])
    out_RV = torch.zeros_like(out_RV).scatter(1, order_RV, out_RV)
    return scores_RV.masked_fill(out_RV, float("-inf"))
