"""What an observer of a run is told. Observers exist on rank 0 only and never change the run."""

from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from ghostvis_mega.train.metrics import StepMetrics

MODULE_ORDER = ("llm", "vision", "resampler", "projector")
"""The order in which learning rates are shown."""


class RunInfo(TypedDict, total=False):
    """What is known when the run starts. `total_steps` is needed; the rest is shown where given."""

    total_steps: int
    start_step: int
    """Steps already done by the checkpoint that the run resumed from; 0 for a fresh run."""
    name: str
    """What people call the run, such as its output directory's name."""
    model: str
    """Preset or another short name."""
    parameters: dict[str, int]
    """Number of parameters by module."""
    trained_parameters: int
    layout: str
    """Degrees of parallelism in one line, such as `TP 2 x PP 1 x DP 2, ZeRO-1`."""
    device: str
    num_devices: int
    peak_flops: float | None
    """Dense peak of one device in FLOP/s for the precision in use; None: no MFU is shown."""
    precision: str
    settings: dict[str, Any]
    """The whole configuration, JSON values."""
    versions: dict[str, str]
    determinism: dict[str, str]
    """What a run with `train.deterministic` has set, and the values."""


class Summary(TypedDict, total=False):
    """How the run ended. Other keys may stand beside these; all values are JSON values."""

    heldout_accuracy: float
    question_only_accuracy: float
    """What the best guess from the question alone reaches on the same questions."""
    num_questions: int
    loss: float
    seconds: float
    """Wall time, of whatever the run's caller counts."""
    goodput: float
    """Productive time over wall time since the run's first launch."""
    goodput_seconds: dict[str, float]
    """All of that wall time, by part of `train.goodput.PARTS`."""
    status: str
    """`finished`, or why not."""


@dataclass(frozen=True)
class Preview:
    """One held-out sample: its pictures, the question, what the model says and the truth."""

    images_png: tuple[bytes, ...]
    """Encoded pictures as they are in the dataset (PNG, JPEG or WebP)."""
    question: str
    answer: str
    truth: str

    @property
    def correct(self) -> bool:
        """Whether answer and truth are the same but for case, outer blanks and a final period."""
        return plain_answer(self.answer) == plain_answer(self.truth)


def plain_answer(text: str) -> str:
    """An answer without case, outer blanks and a final period: what is compared with the truth."""
    return text.strip().removesuffix(".").strip().casefold()


class Observer(Protocol):
    """Told of a run's start, each step, previews and the end, in this order."""

    def on_start(self, run: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, m: StepMetrics) -> None:
        """After each optimizer step."""

    def on_preview(self, step: int, previews: list[Preview]) -> None:
        """After the model answered held-out samples; `step` steps were done."""

    def on_end(self, summary: Summary) -> None:
        """After the last step; not called when the run dies."""


def step_mfu(m: StepMetrics, run: RunInfo) -> float | None:
    """MFU of a step on the devices of `run`, None where their peak is unknown."""
    return m.mfu(num_devices=run.get("num_devices", 1), peak_flops=run.get("peak_flops"))


def ordered_modules(lr: dict[str, float]) -> list[str]:
    """Keys of a learning-rate table in the order in which people read them."""
    known = [name for name in MODULE_ORDER if name in lr]
    return known + sorted(set(lr) - set(known))
