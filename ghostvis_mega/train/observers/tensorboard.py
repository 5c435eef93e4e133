"""The same numbers as TensorBoard events."""

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ghostvis_mega.train.metrics import StepMetrics
from ghostvis_mega.train.observers.base import Preview, RunInfo, Summary
from ghostvis_mega.train.observers.scalars import step_scalars
from ghostvis_mega.utils.errors import MissingDependencyError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes event files under `directory`.

    Raises:
        MissingDependencyError: the package `tensorboard` is not installed.
    """

    def __init__(self, directory: Path):
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingDependencyError(
                "tensorboard", needed_for="log.tensorboard=true", extra="tensorboard"
            )
        self._directory = directory
        self._writer: SummaryWriter | None = None
        self._run: RunInfo = {"total_steps": 0}

    def on_start(self, run: RunInfo) -> None:
        """Open the event file; events after the step resumed from are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        start = run.get("start_step", 0)
        self._writer = SummaryWriter(
            log_dir=str(self._directory), purge_step=start + 1 if start else None
        )

    def on_step(self, m: StepMetrics) -> None:
        """Write every number of the step."""
        assert self._writer is not None, "on_start comes first"
        for name, value in step_scalars(m, self._run).items():
            self._writer.add_scalar(name, value, m.step)

    def on_preview(self, step: int, previews: list[Preview]) -> None:
        """Write each sample's first picture and its text."""
        import numpy as np
        from PIL import Image

        assert self._writer is not None, "on_start comes first"
        for number, preview in enumerate(previews):
            text = (
                f"{preview.question}\n\n    answer: {preview.answer}\n    truth:  {preview.truth}"
            )
            self._writer.add_text(f"preview/{number}", text, step)
            if preview.images_png:
                with Image.open(BytesIO(preview.images_png[0])) as image:
                    pixels_HWC = np.asarray(image.convert("RGB"))
                self._writer.add_image(f"preview/{number}", pixels_HWC, step, dataformats="HWC")
        self._writer.flush()

    def on_end(self, summary: Summary) -> None:
        """Write the summary's numbers and close."""
        assert self._writer is not None, "on_start comes first"
        for name, value in summary.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"summary/{name}", value, self._run["total_steps"])
        self._writer.close()
