"""The same numbers for Weights & Biases; offline unless the settings say otherwise."""

import importlib.util
import os
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary
from ghostvis_mega.train.observers.scalars import step_scalars
from ghostvis_mega.utils.errors import MissingDependencyError


class Wandb:
    """One wandb run; `offline` writes below `directory`/wandb and opens no connection.

    Raises:
        MissingDependencyError: the package `wandb` is not installed.
    """

    def __init__(self, directory: Path, *, mode: Literal["offline", "online"] = "offline"):
        if importlib.util.find_spec("wandb") is None:
            raise MissingDependencyError("wandb", needed_for=f"log.wandb={mode}", extra="wandb")
        self._directory = directory
        self._mode = mode
        self._wandb_run: Any = None
        self._run: RunInfo = {"total_steps": 0}

    def on_start(self, run: RunInfo) -> None:
        """Start the wandb run with the whole configuration."""
        if self._mode == "offline":
            # Read on import: error reports go to wandb's makers even when the run is offline.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = run
        self._directory.mkdir(parents=True, exist_ok=True)
        self._wandb_run = wandb.init(
            project="ghostvis-mega",
            name=run.get("name"),
            dir=str(self._directory),
            mode=self._mode,
            config=run.get("settings", {}),
        )

    def on_step(self, m: StepMetrics) -> None:
        """Log every number of the step."""
        self._wandb_run.log(step_scalars(m, self._run), step=m.step)

    def on_preview(self, step: int, previews: list[Preview]) -> None:
        """Log a table of the samples with their first pictures."""
        import wandb
        from PIL import Image

        table = wandb.Table(columns=["picture", "question", "answer", "truth", "correct"])
        for preview in previews:
            picture = None
            if preview.images_png:
                with Image.open(BytesIO(preview.images_png[0])) as image:
                    picture = wandb.Image(image.convert("RGB"))
            table.add_data(
                picture, preview.question, preview.answer, preview.truth, preview.correct
            )
        self._wandb_run.log({"preview": table}, step=step)

    def on_end(self, summary: Summary) -> None:
        """Store the summary and close the run."""
        self._wandb_run.summary.update(dict(summary))
        self._wandb_run.finish()
