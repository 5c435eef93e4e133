"""What explains a run that gave up: one folder with its settings, last steps and random states."""

import json
import logging
from pathlib import Path
from typing import Any

from ghostvis_mega.checkpoint.random_state import capture_random_state
from ghostvis_mega.checkpoint.tensors import write_tensors
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.files import atomic_write_json

log = logging.getLogger(__name__)

LAST_STEPS = 100


def write_bundle(run: RunConfig, *, done: int, rank: int, ledger: str) -> Path:
    """Write this rank's part after `done` steps, the first rank's with what all share.

    Args:
        run: Settings.
        done: Steps done.
        rank: Of this process.
        ledger: Name of the run's file of steps that were left out.

    Returns:
        The folder, the same on all ranks.
    """
    folder = run.log.output / f"stopped-after-step-{done:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors, texts = capture_random_state()
    random = folder / f"random-{rank:05d}.safetensors"
    random.unlink(missing_ok=True)  # of an earlier launch that came as far
    write_tensors(random, tensors, metadata=texts)
    if rank == 0:
        document = {
            "after_step": done,
            "settings": run.model_dump(mode="json"),
            "versions": package_versions(),
            "left_out": _last_rows(run.log.output / ledger),
            "last_steps": _last_rows(run.log.output / "metrics.jsonl"),
        }
        atomic_write_json(folder / "bundle.json", document)
    return folder


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file of JSON lines that this run writes; a launch that was killed
    may have left a torn one among them."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[-LAST_STEPS - 1 :]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line:
                log.warning("%s has a torn line, which is left out: %.40s", path, line)
    return rows
