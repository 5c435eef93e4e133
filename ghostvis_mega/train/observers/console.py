"""One line a step for people."""

import logging

from ghostvis_mega.train.metrics import Eta, Smoother, StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary, ordered_modules, step_mfu
from ghostvis_mega.utils.format import duration, percent, si

log = logging.getLogger(__name__)

_LR_NAMES = {"vision": "vis", "resampler": "res", "projector": "proj"}


def format_step(
    m: StepMetrics, *, total_steps: int, smooth_loss: float, mfu: float | None, eta_s: float
) -> str:
    """The line of one step, its columns aligned over a run.

    Args:
        m: the step.
        total_steps: steps of the whole run.
        smooth_loss: running mean of the loss, shown beside the step's own.
        mfu: fraction of the devices' peak, None where the peak is unknown: the column is absent.
        eta_s: seconds to the last step.
    """
    width = len(str(total_steps))
    columns = [
        f"step {m.step:>{width}}/{total_steps}",
        f"loss {m.loss:7.4f} ({smooth_loss:.4f})",
        f"lr {_format_lr(m.lr)}",
        f"norm {m.grad_norm:7.3f}",
        f"{si(m.tokens_per_s):>5} tok/s",
        f"{si(m.images_per_s):>5} img/s",
    ]
    if mfu is not None:
        columns.append(f"MFU {percent(mfu):>6}")
    columns.append(f"data {duration(m.timing.get('data', 0.0)):>6}")
    columns.append(f"eta {duration(eta_s)}")
    if m.skipped:
        columns.append("SKIPPED")
    return "  ".join(columns)


def _format_lr(lr: dict[str, float]) -> str:
    """One number when all modules share it, else `llm 1.0e-04 vis 1.0e-05 ...`."""
    if len(set(lr.values())) == 1:
        return f"{next(iter(lr.values())):.1e}"
    return " ".join(f"{_LR_NAMES.get(name, name)} {lr[name]:.1e}" for name in ordered_modules(lr))


class ConsoleLine:
    """Logs a line every `every` steps, the first and the last step always."""

    def __init__(self, *, every: int = 1):
        self._every = every
        self._run: RunInfo = {"total_steps": 0}
        self._smooth_loss = Smoother()
        self._eta = Eta()

    def on_start(self, run: RunInfo) -> None:
        """Say what runs."""
        self._run = run
        parts = [run.get("model", "model")]
        if parameters := run.get("parameters"):
            parts.append(f"{si(sum(parameters.values()))} parameters")
        parts += [run[key] for key in ("layout", "device", "precision") if key in run]
        log.info("%s", ", ".join(parts))
        if start := run.get("start_step", 0):
            log.info("resumes after step %d of %d", start, run["total_steps"])

    def on_step(self, m: StepMetrics) -> None:
        """Log the step; a skipped one is logged whatever `every` says."""
        smooth = self._smooth_loss.update(m.loss)
        self._eta.update(m.seconds)
        total = self._run["total_steps"]
        first = self._run.get("start_step", 0) + 1
        if m.step % self._every and m.step not in (first, total) and not m.skipped:
            return
        line = format_step(
            m,
            total_steps=total,
            smooth_loss=smooth,
            mfu=step_mfu(m, self._run),
            eta_s=self._eta.seconds_left(max(0, total - m.step)),
        )
        log.log(logging.WARNING if m.skipped else logging.INFO, "%s", line)

    def on_preview(self, step: int, previews: list[Preview]) -> None:
        """Log how many answers were right and the first wrong one."""
        correct = sum(preview.correct for preview in previews)
        wrong = next((preview for preview in previews if not preview.correct), None)
        text = (
            ""
            if wrong is None
            else f"; {wrong.question!r}: {wrong.answer!r}, truth {wrong.truth!r}"
        )
        log.info("preview at step %d: %d of %d answers right%s", step, correct, len(previews), text)

    def on_end(self, summary: Summary) -> None:
        """Log the accuracy, if it was measured, and the time."""
        if "heldout_accuracy" in summary:
            beside = ""
            if "question_only_accuracy" in summary:
                ceiling = percent(summary["question_only_accuracy"])
                beside = f" (best guess from the question alone: {ceiling})"
            log.info("held-out accuracy %s%s", percent(summary["heldout_accuracy"]), beside)
        if "goodput" in summary:
            rest = sorted(summary["goodput_seconds"].items(), key=lambda item: -item[1])
            lost = [(name, seconds) for name, seconds in rest if name != "productive" and seconds]
            told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in lost[:3])
            log.info("goodput %s since the first launch (%s)", percent(summary["goodput"]), told)
        if "seconds" in summary:
            log.info("%s after %s", summary.get("status", "finished"), duration(summary["seconds"]))
