"""The training loop: fetch, step, report, preview, save."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ghostvis_mega.data.batch import GlobalBatch
from ghostvis_mega.engine.step import StepInput, StepResult, TrainEngine
from ghostvis_mega.model.flops import batch_flops
from ghostvis_mega.parallel.volume import dispatch_figures
from ghostvis_mega.train.damage import agree_before_step
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.build import Observers
from ghostvis_mega.train.previews import Previewer
from ghostvis_mega.train.signals import StopRequest
from ghostvis_mega.train.watchdog import Watchdog
from ghostvis_mega.utils.errors import TrainingError

log = logging.getLogger(__name__)

MAX_SKIPPED = 3
"""Skipped steps in a row after which a run stops: it would not come back by itself."""


@dataclass
class Loop:
    """One run from `start` to its last step."""

    engine: TrainEngine
    feed: Feed
    observers: Observers
    watchdog: Watchdog
    previewer: Previewer | None
    save: Callable[[int], None]
    """Called with the number of steps done."""
    stop: StopRequest = field(default_factory=StopRequest)

    def run(self, *, start: int) -> float | None:
        """Train the remaining steps, or those until the ranks agree to stop; what was trained is
        then saved. Returns the last loss that was finite.

        Args:
            start: Steps already done.

        Raises:
            TrainingError: `MAX_SKIPPED` steps in a row had no finite loss or gradient.
        """
        settings = self.engine.run
        loss, skipped, saved = None, 0, start
        if start == 0:
            self.preview(0)
        for step in range(start, settings.train.steps):
            self.watchdog.alive(f"step {step + 1}")
            began = time.perf_counter()
            batch, work = self.feed.get(step)
            work, number = agree_before_step(
                batch,
                work,
                self.feed.corpus,
                self.engine.groups,
                device=self.engine.device,
                stop=self.stop.asked,
            )
            self.stop.agree(number, done=step)
            if number:
                if saved < step:
                    self.checkpoint(step)
                break
            fetched = time.perf_counter()
            result = self.engine.step(work, step=step)
            # Reading the timer waits for the optimizer's last kernel, so the step's end follows it.
            timing = {"data": fetched - began} | self.engine.timer.read()
            ended = time.perf_counter()
            metrics = self.measure(step, batch, result, timing, work=work, seconds=ended - began)
            self.observers.on_step(metrics)
            done = step + 1
            skipped = skipped + 1 if result.skipped else 0
            if skipped == MAX_SKIPPED:
                raise TrainingError(
                    f"steps {done - skipped + 1} to {done} had no finite loss or gradient; none of "
                    "them changed a weight. Lower optim.lr, or look at the data of these steps."
                )
            loss = loss if result.skipped else result.loss
            self.preview(done)
            if self.save_is_due(done):
                self.checkpoint(done)
                saved = done
        return loss

    def checkpoint(self, done: int) -> None:
        """Save after `done` steps."""
        self.watchdog.alive(f"the save after step {done}")
        self.save(done)

    def save_is_due(self, done: int) -> bool:
        """Whether the settings ask for a checkpoint after `done` steps."""
        settings = self.engine.run
        if done == settings.train.steps:
            return settings.checkpoint.save_at_end
        every = settings.checkpoint.save_every
        return every > 0 and done % every == 0

    def preview(self, done: int) -> None:
        """Show held-out answers where the settings ask for them after `done` steps."""
        if self.previewer is not None and done in self.engine.run.log.preview_steps:
            self.watchdog.alive(f"previews after step {done}")
            self.observers.on_preview(done, self.previewer.look(progress=self.watchdog.alive))
            # What the tower took for these pictures belongs to no step.
            self.engine.timer.read()

    def measure(
        self,
        step: int,
        batch: GlobalBatch,
        result: StepResult,
        timing: dict[str, float],
        *,
        work: StepInput,
        seconds: float,
    ) -> StepMetrics:
        """The numbers of one step of the whole job."""
        run = self.engine.run
        flops = batch_flops(
            run.model,
            segments=[n for row in batch.sequences for n in self.feed.lengths(row)],
            head_rows=batch.trained_tokens,
            num_images=work.dispatch.num_images,
            trained=run.trained_modules,
        )
        return StepMetrics(
            step=step + 1,
            loss=result.loss,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            lr={
                module: result.lr_factor * getattr(run.optim.lr, module)
                for module in run.trained_modules
            },
            tokens=batch.num_tokens,
            trained_tokens=batch.trained_tokens,
            images=work.dispatch.num_images,
            samples=batch.num_samples,
            seconds=seconds,
            timing=timing,
            flops_llm=flops.llm.total,
            flops_vision=flops.vision.total,
            dispatch=dispatch_figures(
                work.dispatch, run, self.engine.groups.places, rows=work.image_rows
            ),
        )
