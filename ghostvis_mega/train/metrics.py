"""The numbers of one optimizer step, and the rates that follow from them."""

import dataclasses
import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step of the whole job, as rank 0 knows it after the step.

    Tokens are useful ones: padding is not counted, image positions are. `timing` is rank 0's wall
    time in seconds by phase and sums to at most `seconds`; the rest is shown as "other".
    """

    step: int
    loss: float
    """Mean over the trained tokens of the global batch."""
    grad_norm: float
    """Global norm over all modules, before the clip."""
    skipped: bool
    """True when the update was not applied: the loss or a gradient was not finite, or refused."""
    lr: dict[str, float]
    """By module, those that train only."""
    tokens: int
    trained_tokens: int
    images: int
    samples: int
    seconds: float
    timing: dict[str, float]
    flops_llm: float
    flops_vision: float
    dispatch: dict[str, float] = field(default_factory=dict)
    """How pictures were spread: `imbalance` (patches of the busiest rank over the mean), bytes of
    embeddings and gradients a rank (`sent_mean`, `sent_max`, `received_max`) and the `local_share`
    that did not travel. Empty for a model without pictures."""
    goodput: float = math.nan
    """Productive time over wall time since the run's first launch."""

    @property
    def tokens_per_s(self) -> float:
        """Useful tokens a second, whole job."""
        return self.tokens / self.seconds

    @property
    def images_per_s(self) -> float:
        """Images a second, whole job."""
        return self.images / self.seconds

    @property
    def other_s(self) -> float:
        """Seconds of the step that no phase in `timing` claims."""
        return max(0.0, self.seconds - sum(self.timing.values()))

    def mfu(self, *, num_devices: int, peak_flops: float | None) -> float | None:
        """Model FLOP/s over the peak of all devices, or None where the peak is unknown.

        Args:
            num_devices: devices of the job.
            peak_flops: dense peak of one device in FLOP/s for the precision in use.
        """
        if peak_flops is None:
            return None
        return (self.flops_llm + self.flops_vision) / (self.seconds * num_devices * peak_flops)

    def to_json(self, extra: Mapping[str, float | None] | None = None) -> str:
        """One line of strict JSON; a number that is not finite becomes null.

        Args:
            extra: derived numbers to write beside the fields.
        """
        row = finite_or_none(dataclasses.asdict(self) | dict(extra or {}))
        return json.dumps(row, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "StepMetrics":
        """The step that `to_json` wrote; null numbers come back as NaN.

        Raises:
            ValueError: the line is not such a step.
        """
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        entries = dataclasses.fields(cls)
        needed = [
            entry.name
            for entry in entries
            if entry.default_factory is dataclasses.MISSING and entry.default is dataclasses.MISSING
        ]
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"no key {missing[0]!r}")
        names = [entry.name for entry in entries if entry.name in row]
        return cls(**{name: _none_to_nan(row[name]) for name in names})


def finite_or_none(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    return value


def _none_to_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _none_to_nan(entry) for key, entry in value.items()}
    return math.nan if value is None else value


class Smoother:
    """Exponential moving average that is unbiased from the first value and ignores NaN and inf."""

    def __init__(self, *, decay: float = 0.95):
        self._decay = decay
        self._total = 0.0
        self._weight = 0.0

    def update(self, value: float) -> float:
        """Take in a value and return the average so far; NaN before the first finite one."""
        if math.isfinite(value):
            self._total = self._decay * self._total + (1 - self._decay) * value
            self._weight = self._decay * self._weight + (1 - self._decay)
        return self._total / self._weight if self._weight else math.nan


class Eta:
    """Seconds left, from a trimmed mean of recent step times.

    The first step of a process compiles and warms up, and a save or an evaluation makes single
    steps long: the first one is left out once others are known, and a tenth at both ends always.
    """

    def __init__(self, *, window: int = 64):
        self._recent: deque[float] = deque(maxlen=window)
        self._seen = 0

    def update(self, seconds: float) -> None:
        """Take in the wall time of a step."""
        if self._seen == 1:
            self._recent.clear()
        self._recent.append(seconds)
        self._seen += 1

    def seconds_left(self, steps_left: int) -> float:
        """Estimate for `steps_left` more steps; NaN before the first step is known."""
        if steps_left == 0:
            return 0.0
        if not self._recent:
            return math.nan
        ordered = sorted(self._recent)
        cut = len(ordered) // 10
        kept = ordered[cut : len(ordered) - cut]
        return steps_left * sum(kept) / len(kept)
