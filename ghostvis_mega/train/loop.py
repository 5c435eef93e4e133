"""The training loop: fetch, step, report, preview, save."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from ghostvis_mega.data.batch import GlobalBatch
from ghostvis_mega.engine.step import StepInput, StepResult, TrainEngine
from ghostvis_mega.parallel.calls import CallWatch
from ghostvis_mega.parallel.volume import dispatch_figures
from ghostvis_mega.train.damage import agree_before_step
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.goodput import Goodput
from ghostvis_mega.train.guards import Action, Guards
from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.build import Observers
from ghostvis_mega.train.previews import Previewer
from ghostvis_mega.train.signals import StopRequest
from ghostvis_mega.train.slow_ranks import SlowRanks, work_of
from ghostvis_mega.train.watchdog import Watchdog
from ghostvis_mega.utils.errors import TrainingError

log = logging.getLogger(__name__)


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
    guards: Guards
    slow_ranks: SlowRanks | None = None
    calls: CallWatch | None = None
    """Of this process to others; with it, slow ranks are looked for."""
    stop: StopRequest = field(default_factory=StopRequest)
    goodput: Goodput = field(default_factory=lambda: Goodput(None))
    go_back: Callable[[], int | None] = lambda: None
    """Makes the engine what it was at the last checkpoint; returns the steps of that, None where
    there is none. Collective."""
    give_up: Callable[[int], str] = lambda done: ""
    """Writes down all that explains a run that stops after `done` steps; returns where."""

    def run(self, *, start: int) -> float | None:
        """Train the remaining steps, or those until the ranks agree to stop; what was trained is
        then saved. Returns the last loss that was trained on.

        Args:
            start: Steps already done.

        Raises:
            TrainingError: `guards.max_skipped` steps in a row were left out.
        """
        settings = self.engine.run
        loss, saved = None, start
        self.goodput.ready(start=start)
        if start == 0:
            self.preview(0)
        for step in range(start, settings.train.steps):
            done = step + 1
            self.watchdog.alive(f"step {done}")
            fetched = self.fetch(step)
            if fetched is None:
                if saved < step:
                    self.checkpoint(step)
                break
            result = self.take(step, fetched)
            action = self.guards.after(
                step, result, fetched.batch, fetched.work.windows, self.feed.corpus
            )
            if action is Action.STOP:
                self.refuse(done, result)
            if action is Action.ROLL_BACK:
                self.roll_back(done)
            loss = loss if result.skipped else result.loss
            self.preview(done)
            if self.save_is_due(done):
                self.checkpoint(done)
                saved = done
        self.goodput.write()
        return loss

    def fetch(self, step: int) -> "Fetched | None":
        """The batch of a step as all ranks take it; None where they agree to stop before it."""
        self.guards.before(step)
        began = time.perf_counter()
        batch, work = self.feed.get(step)
        read_s = time.perf_counter() - began
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
            return None
        data_s = time.perf_counter() - began
        return Fetched(batch, work, began=began, read_s=read_s, data_s=data_s)

    def take(self, step: int, fetched: "Fetched") -> StepResult:
        """Train on a batch, and tell the observers."""
        work, slow = fetched.work, self.slow_ranks
        if slow is not None:
            work = dataclasses.replace(work, told=slow.tell(step))
        measured = slow is not None and self.calls is not None and slow.measures(step)
        if measured:
            self.calls.waiting = self.engine.timer.waiting
        result = self.engine.step(work, step=step, accept=self.guards.accept)
        # Reading the timer waits for the optimizer's last kernel, so the step's end follows it.
        timing = {"data": fetched.data_s} | self.engine.timer.read()
        seconds = time.perf_counter() - fetched.began
        if measured:
            self.calls.waiting = None
            waits = self.engine.timer.waits
            own_s = {name: value - waits.get(name, 0.0) for name, value in timing.items()}
            groups = self.engine.groups
            own_work = work_of(work, places=groups.places, rank=groups.rank)
            slow.note(own_s | {"data": fetched.read_s}, own_work)
        if slow is not None:
            slow.judge(result.told, step=step)
        self.goodput.step(step + 1, seconds=seconds, data=fetched.data_s, skipped=result.skipped)
        metrics = self.measure(step, fetched.batch, result, timing, work=work, seconds=seconds)
        self.observers.on_step(metrics)
        return result

    def refuse(self, done: int, result: StepResult) -> NoReturn:
        """Stop a run that does not come back by itself."""
        first = done - self.guards.skipped_in_a_row + 1
        self.goodput.write()
        place = self.give_up(done)
        raise TrainingError(
            f"steps {first} to {done} were left out, the last for {result.cause}; none of them "
            "changed a weight. Lower optim.lr, or look at the data of these steps"
            f"{f' ({place})' if place else ''}."
        )

    def roll_back(self, done: int) -> None:
        """Answer a spike in step `done`: weights and optimizer become those of the last checkpoint,
        and the run goes on behind the spike, without the batches between."""
        self.watchdog.alive(f"going back from step {done}")
        back = self.go_back()
        if back is None:
            log.warning("no checkpoint to go back to: the step alone is left out")
            return
        assert back < done, "weights of a later step cannot be this run's"
        log.warning("weights are those after step %d again; going on with step %d", back, done + 1)
        self.goodput.undo(back)

    def checkpoint(self, done: int) -> None:
        """Save after `done` steps."""
        self.watchdog.alive(f"the save after step {done}")
        with self.goodput.part("save"):
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
            with self.goodput.part("evaluation"):
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
        flops = self.feed.flops(batch)
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
            images=len(batch.image_ids),
            samples=batch.num_samples,
            seconds=seconds,
            timing=timing,
            flops_llm=flops.llm.total,
            flops_vision=flops.vision.total,
            dispatch=dispatch_figures(work.windows, run, self.engine.groups.places),
            goodput=self.goodput.share,
        )


@dataclass(frozen=True)
class Fetched:
    """A batch that all ranks agree on."""

    batch: GlobalBatch
    work: StepInput
    began: float
    """`time.perf_counter` before it was asked for."""
    read_s: float
    """Seconds that this rank took to have it."""
    data_s: float
    """Seconds until all ranks had theirs."""
