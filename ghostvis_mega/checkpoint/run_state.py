"""What a run keeps in checkpoints beside weights and optimizers, and how it comes back to it."""

import logging
from dataclasses import dataclass

from ghostvis_mega.checkpoint.store import CheckpointStore, load_weights
from ghostvis_mega.config.schema import CheckpointConfig
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.guards import Guards
from ghostvis_mega.utils.errors import CheckpointError, FolderTakenError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """The parts of a run that a checkpoint holds; every method is collective."""

    store: CheckpointStore
    engine: TrainEngine
    feed: Feed
    guards: Guards

    def save(self, steps: int) -> None:
        """Begin a checkpoint after `steps` steps."""
        extra = {"data": self.feed.state(), "guards": self.guards.state()}
        self.store.begin(self.engine, step=steps, extra=extra)

    def restore(self, settings: CheckpointConfig) -> int:
        """Take over the checkpoint that the settings name, if any; returns the steps done.

        Raises:
            CheckpointError: It is missing, damaged, of another model or of other data.
        """
        state = self.store.resume(settings.resume, self.engine)
        if state is None:
            if settings.weights is not None:
                load_weights(
                    settings.weights,
                    self.engine,
                    modules=settings.weights_of or None,
                    progress=self.store.progress,
                    group=self.store.group(),
                )
            return 0
        data = state.extra.get("data")
        if isinstance(data, dict):
            self.feed.check_state(data, step=state.step)
        self.guards.restore(state.extra.get("guards"))
        return state.step

    def go_back(self) -> int | None:
        """Weights and optimizers become those of this run's newest checkpoint; returns its steps,
        None where there is none."""
        try:
            self.store.wait()
        except FolderTakenError:
            raise
        except CheckpointError as error:
            log.warning("%s. Going back to the checkpoint before it", error)
        state = self.store.go_back(self.engine)
        if state is None:
            return None
        self.guards.go_back(state.extra.get("guards"), steps=state.step)
        return state.step
