"""Answers in the making, side by side: everything that a decoding step reads and writes stays in
place, so that on a GPU the whole step is recorded once and then started as one.

Shape legend: R rows, W tokens between two looks by the host.
"""

import logging

import torch

from ghostvis_mega.generate.decoder import Decoder
from ghostvis_mega.generate.sampling import Modes, RowOptions, Sampling, choose

log = logging.getLogger(__name__)

GPU_WINDOW = 8
"""Decoding steps between two looks at what came out: the host waits for a GPU only then."""
_LENGTH_MULTIPLE = 256


class Rows:
    """Static state of R rows.

    Args:
        decoder: The model.
        rows: How many.
        length: Positions of each.
        draws: Longest answer.
        vocab: Rows of the model's vocabulary that are no padding.
        choices: Tokens that may come: the first ones of these.
        window: Decoding steps between two looks at what came out.
        graphs: Record steps as CUDA graphs.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int,
        length: int,
        draws: int,
        vocab: int,
        choices: int,
        window: int,
        graphs: bool,
    ):
        device = decoder.device
        self.decoder, self.count, self.vocab, self.graphs = decoder, rows, vocab, graphs
        self.window = window
        self.length = -(-(length + window) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        self.draws = draws
        self.cache = decoder.cache(rows, self.length)
        self.options = RowOptions(rows, length=draws + window + 1, vocab=choices, device=device)
        self.tokens_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths_R = torch.zeros_like(self.tokens_R)
        self.steps_R = torch.zeros_like(self.tokens_R)
        self.active_R = torch.zeros_like(self.tokens_R)
        self.out_tokens_RW = torch.zeros(rows, window, dtype=torch.int64, device=device)
        self.out_logprobs_RW = torch.zeros(rows, window, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._recorded: dict[tuple[int, Modes], torch.cuda.CUDAGraph] = {}

    def fits(self, *, rows: int, length: int, draws: int) -> bool:
        """Whether answers of such sizes fit."""
        return rows <= self.count and length + self.window <= self.length and draws <= self.draws

    def start(
        self,
        rows: list[int],
        lengths: list[int],
        samplings: list[tuple[Sampling, int, list[int]]],
        scores_RV: torch.Tensor,
    ) -> tuple[list[int], list[float]]:
        """Begin answers whose prompts are in the cache; returns their first tokens.

        Args:
            rows: Where.
            lengths: Positions of each prompt.
            samplings: Options, number of the answer, prompt.
            scores_RV: After the prompts' last tokens.
        """
        for row, (sampling, sample, prompt) in zip(rows, samplings, strict=True):
            self.options.set(row, sampling, sample=sample, prompt=prompt)
        device = self.tokens_R.device
        index = torch.tensor(rows, device=device)
        modes = Modes.of([sampling for sampling, _, _ in samplings])
        steps_R = torch.zeros_like(index)
        chosen_R, logprobs_R = choose(
            scores_RV[:, : self.vocab], steps_R, self.options.rows(rows), modes
        )
        self.tokens_R[index] = chosen_R
        self.lengths_R[index] = torch.tensor(lengths, device=device)
        self.steps_R[index] = 1
        self.active_R[index] = 1
        self.options.seen_RV[index, chosen_R] = True
        return chosen_R.tolist(), logprobs_R.tolist()

    def stop(self, rows: list[int]) -> None:
        """Rows whose answers have ended; they idle at their first position."""
        index = torch.tensor(rows, device=self.tokens_R.device)
        self.active_R[index] = 0
        self.lengths_R[index] = 0
        self.steps_R[index] = 0

    def run(self, count: int, modes: Modes) -> tuple[list[list[int]], list[list[float]]]:
        """A window of decoding steps for the first rows: their tokens and log-probabilities.

        Args:
            count: How many rows are computed, rounded up to a power of two.
            modes: What these need.
        """
        count = min(1 << (count - 1).bit_length(), self.count)
        self._column.zero_()
        graph = self._graph(count, modes) if self.graphs else None
        for _ in range(self.window):
            if graph is None:
                self._step(count, modes)
            else:
                graph.replay()
        return self.out_tokens_RW[:count].tolist(), self.out_logprobs_RW[:count].tolist()

    def _step(self, count: int, modes: Modes) -> None:
        tokens_R, lengths_R = self.tokens_R[:count], self.lengths_R[:count]
        steps_R, active_R = self.steps_R[:count], self.active_R[:count]
        options = self.options.rows(slice(0, count))
        scores_RV = self.decoder.step(tokens_R, lengths_R, self.cache.rows(count))
        chosen_R, logprobs_R = choose(scores_RV[:, : self.vocab], steps_R, options, modes)
        if modes.penalises:
            options.seen_RV.scatter_(1, chosen_R[:, None], True)
        lengths_R += active_R
        steps_R += active_R
        tokens_R.copy_(chosen_R)
        self.out_tokens_RW[:count].index_copy_(1, self._column, chosen_R[:, None])
        self.out_logprobs_RW[:count].index_copy_(1, self._column, logprobs_R[:, None])
        self._column += 1

    def _graph(self, count: int, modes: Modes) -> torch.cuda.CUDAGraph:
        """The recorded step; recording changes nothing that a later step reads."""
        key = (count, modes)
        if key not in self._recorded:
            moving = (
                self.tokens_R,
                self.lengths_R,
                self.steps_R,
                self._column,
                self.options.seen_RV,
            )
            kept = [tensor.clone() for tensor in moving]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step(count, modes)
                    self._column.zero_()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(count, modes)
            for tensor, old in zip(moving, kept, strict=True):
                tensor.copy_(old)
            self._recorded[key] = graph
            log.debug("recorded a decoding step of %d rows", count)
        return self._recorded[key]
