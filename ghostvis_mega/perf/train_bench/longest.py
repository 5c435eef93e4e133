"""The longest sequence that fits into the memory of the devices, found by trying.

Memory grows about linearly with the length of a sequence, as attention never holds its scores, so
two lengths that fit tell where the end should be, and one does where memory can be predicted;
trying goes on there until the longest one that fits and the shortest one that does not are close.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.memory import predict, unpredictable
from ghostvis_mega.perf.train_bench.plans import TextNeed
from ghostvis_mega.perf.train_bench.preset_parts import (
    DEEPSPEED,
    SIZES,
    base_settings,
    pack_settings,
)
from ghostvis_mega.perf.train_bench.results import (
    ALLOCATED,
    TFLOPS,
    TOKENS,
    RowResult,
    row_values,
)
from ghostvis_mega.perf.train_bench.rows import Row
from ghostvis_mega.utils.figures import Figure, measured
from ghostvis_mega.utils.hardware import has_cuda_device

TINY, TINY_VOCABULARY = "tiny", 1024
LENGTHS_OF = (*SIZES, TINY)
"""Sizes whose longest sequence can be asked for."""
CLOSE = 16
"""The search ends when the gap is a sixteenth of the longest length that fits."""
USABLE = 0.95
"""Of a device's memory: CUDA, NCCL and the gaps between blocks have the rest."""
STEPS = 2
"""Of a try: the second one has the optimizer's state from its beginning."""


@dataclass(frozen=True)
class Try:
    """One length that was tried."""

    length: int
    result: RowResult

    @property
    def fits(self) -> bool:
        """It trained to the end of the try."""
        return not self.result.failure

    @property
    def broken(self) -> bool:
        """It failed, and not for want of memory."""
        return not self.fits and not self.result.excused


@dataclass(frozen=True)
class Search:
    """Lengths to try, all multiples of `grain` between `first` and `most`."""

    first: int
    most: int
    grain: int
    predicted: Callable[[int], int] | None = None
    """Bytes that a length takes, if they can be told."""

    def following(self, tries: Sequence[Try]) -> int | None:
        """The length to try after these; None: the answer is there, or a try is broken."""
        if not tries:
            return self._round(self.first)
        if any(one.broken for one in tries):
            return None
        low = max((one.length for one in tries if one.fits), default=0)
        high = min((one.length for one in tries if not one.fits), default=None)
        guess = self._guess(tries)
        if high is None:
            if low >= self._round(self.most):
                return None
            longer = 2 * low if guess is None else max(guess, low + self._gap(low))
            return min(self._round(longer), self._round(self.most))
        if low == 0:
            return self._round(high // 2) if high > self.grain else None
        gap = self._gap(low)
        if high - low <= gap:
            return None
        if guess is None or all(not one.fits for one in tries[-2:]):
            return self._round((low + high) // 2)
        return self._round(min(max(guess, low + gap), high - gap))

    def _gap(self, low: int) -> int:
        return self._round(max(self.grain, low // CLOSE))

    def _round(self, length: int) -> int:
        return max(self.grain, length // self.grain * self.grain)

    def _guess(self, tries: Sequence[Try]) -> int | None:
        """Where the line through the two longest lengths that fit meets the device's memory."""
        fits = sorted((one for one in tries if one.fits), key=lambda one: one.length)[-2:]
        if len(fits) == 1 and self.predicted is not None:
            return self._where_predicted(fits[0], self.predicted)
        if len(fits) < 2 or any(one.result.allocated_bytes is None for one in fits):
            return None
        (short, less), (long, more) = ((one.length, one.result.allocated_bytes) for one in fits)
        device_bytes = fits[-1].result.device_bytes
        if device_bytes is None or more <= less:
            return None
        return self._round(
            long + int((USABLE * device_bytes - more) * (long - short) / (more - less))
        )

    def _where_predicted(self, one: Try, predicted: Callable[[int], int]) -> int | None:
        """The longest length that the prediction, put right at `one`, has in the device."""
        measured_bytes, device_bytes = one.result.allocated_bytes, one.result.device_bytes
        if measured_bytes is None or device_bytes is None:
            return None
        room = USABLE * device_bytes - (measured_bytes - predicted(one.length))
        lengths = range(one.length, max(self.most, one.length) + 1, self.grain)
        place = bisect.bisect_right(lengths, room, key=predicted)
        return self._round(lengths[max(place - 1, 0)])


@dataclass(frozen=True)
class Mode:
    """One way to save memory, by the settings that differ."""

    name: str
    settings: tuple[str, ...]


def default_modes(size: str, processes: int) -> list[Mode]:
    """What is tried where nothing is named: cut over all processes, 7B by tensor parallelism and
    smaller ones by context parallelism, and less and less kept on the device."""
    axis = "tensor" if size == "7b" else "context"
    cut = (f"parallel.{axis}={processes}",) if processes > 1 else ()
    host = f"deepspeed.llm={DEEPSPEED / 'zero2_offload.json'}"
    return [
        Mode("as it is", cut),
        Mode("MLPs run again", (*cut, "train.recompute=selective")),
        Mode("layers run again", (*cut, "train.recompute=full")),
        Mode("layers run again, optimizer on the host", (*cut, "train.recompute=full", host)),
    ]


def settings_of(size: str) -> dict[str, Any]:
    """A run file's content for text in this size."""
    if size in SIZES:
        return base_settings(SIZES[size].text)
    base = base_settings("vlm_tiny", precision="bf16" if has_cuda_device() else "fp32")
    base["model"] |= {"vision": None, "connector": None, "llm": {"vocab_size": TINY_VOCABULARY}}
    return base


def prediction(run: RunConfig, *, processes: int, replicas: int) -> Callable[[int], int] | None:
    """Bytes of a rank by the length of a sequence; None where they cannot be told.

    Args:
        run: Settings of a mode, of any length.
        processes: Ranks of a try.
        replicas: Sequences of a step.
    """
    mode = run.train.recompute
    if mode == "auto" or unpredictable(run, world_size=processes):
        return None

    def total(length: int) -> int:
        parts = {
            "data": run.data.model_copy(update={"seq_length": length}),
            "batch": run.batch.model_copy(update={"global_size": replicas}),
        }
        there = run.model_copy(update=parts)
        return predict(there, mode, world_size=processes, pictures=0).total

    return total


def need_of(length: int, *, replicas: int, vocab_size: int, folder: Path) -> TextNeed:
    """A dataset with one sample of this length for each replica and step."""
    path = folder / f"text-{length}-{vocab_size}.gvd"
    return TextNeed(path, length, vocab_size=vocab_size, samples=STEPS * replicas)


def row_of(mode: Mode, need: TextNeed, *, replicas: int) -> Row:
    """A step on one sequence of one sample for each replica."""
    length = need.sample_length
    packs = pack_settings(replicas, length, need.path, f"model.llm.max_positions={length}")
    return Row(f"{mode.name}, {length}", settings=(*packs, *mode.settings), may_not_fit=True)


def find_longest(search: Search, attempt: Callable[[int], RowResult]) -> Iterator[Try]:
    """The tries of one mode, each as soon as it has ended.

    Args:
        search: Which lengths.
        attempt: Trains on sequences of a length.
    """
    tries: list[Try] = []
    while (length := search.following(tries)) is not None:
        tries.append(Try(length, attempt(length)))
        yield tries[-1]


def figures_of(mode: Mode, tries: Sequence[Try]) -> list[Figure]:
    """The longest length that fits, with its memory and speed, and the shortest that does not."""
    broken = next((one for one in tries if one.broken), None)
    if broken is not None:
        return [measured(f"{mode.name}: failed", broken.result.failure, ok=False)]
    best = max((one for one in tries if one.fits), key=lambda one: one.length, default=None)
    over = min((one.length for one in tries if not one.fits), default=None)
    figures = [measured(f"{mode.name}: longest that fits", best and best.length, "tokens")]
    if over is not None:
        figures.append(measured(f"{mode.name}: does not fit", over, "tokens"))
    if best is not None:
        values = row_values(best.result)
        figures += [
            measured(f"{mode.name}: {name}", *values[name])
            for name in (ALLOCATED, TOKENS, TFLOPS)
            if name in values
        ]
    return figures
