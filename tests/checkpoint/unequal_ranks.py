"""Two ranks that save together: the second one has no room at first, then a slow disk."""

import datetime
import json
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint import saving, store
from ghostvis_mega.checkpoint.drill_state import drill_snapshot
from ghostvis_mega.checkpoint.snapshot import HostBuffers, Snapshot
from ghostvis_mega.checkpoint.store import CheckpointStore
from ghostvis_mega.train.watchdog import Watchdog
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.forks import run_forked

TIMEOUT_S = 3.0
SLOW_S = 5.0


def told(action: Any, *, like: str) -> list[str]:
    """Whether it fails with this in its sentence."""
    try:
        action()
    except CheckpointError as error:
        return [like] if like in str(error) else [str(error)]
    return []


def both(folder: Path, rank: int) -> dict[str, Any]:
    """One rank."""
    logging.basicConfig(level=logging.WARNING)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    write = saving.write_buffer

    def buffers(engine: None, *, room: bool) -> HostBuffers:
        if rank == 1 and not room:
            raise CheckpointError("no room on rank 1")
        return HostBuffers(pinned=False)

    def snapshot(engine: None, buffers: HostBuffers, *, step: int) -> Snapshot:
        return drill_snapshot(step, rank=rank, ranks=2)

    def slowly(path: Path, content_B: torch.Tensor, **options: Any) -> None:
        for _ in range(10):
            time.sleep(SLOW_S / 10 / 2)  # it has two files
            options["moved"](1)
        write(path, content_B, **options)

    watchdog = Watchdog(timeout_s=60.0, rank=rank)
    checkpoints = CheckpointStore(folder / "run", keep=2, progress=watchdog.progress)
    results: dict[str, Any] = {"timeout_s": TIMEOUT_S}
    with mock.patch.object(store, "take_snapshot", snapshot):
        with mock.patch.object(store, "make_buffers", partial(buffers, room=False)):
            results["prepare"] = told(lambda: checkpoints.prepare(None), like="no room on rank 1")
            checkpoints.begin(None, step=1, extra={})
            results["begin"] = told(checkpoints.wait, like="no room on rank 1")
        with mock.patch.object(store, "make_buffers", partial(buffers, room=True)):
            checkpoints.begin(None, step=2, extra={})
            checkpoints.wait()
        watchdog.alive("the last save")
        watchdog.timeout_s = TIMEOUT_S
        began = time.monotonic()
        with mock.patch.object(saving, "write_buffer", slowly if rank == 1 else write):
            checkpoints.begin(None, step=3, extra={})
            checkpoints.close()
        results["seconds"] = time.monotonic() - began
    watchdog.close()
    results["saved"] = [path.name for path in checkpoints.folder.candidates()]
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = run_forked(partial(both, folder), ranks=2, folder=folder, timeout_s=90)
    sys.stdout.write(json.dumps(found))
