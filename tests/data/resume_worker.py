"""Forks feeds that continue from the newest checkpoint; the test kills them.

`python resume_worker.py DIR` reads lines `WORKERS STEP` from stdin. The child appends `STEP HASH`
lines up to that step and waits for its end there, or goes on where the step is -1.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from ghostvis_mega.checkpoint.folder import CheckpointFolder  # noqa: E402
from ghostvis_mega.checkpoint.manifest import read_manifest, write_manifest  # noqa: E402

SAVE_EVERY = 3


def _load_feeds():  # noqa: ANN202
    spec = importlib.util.spec_from_file_location("feeds", HERE / "feeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(folder: CheckpointFolder, step: int, state: dict) -> None:
    """A checkpoint as the run writes it, without tensors."""
    document = {
        "serial": folder.next_serial(),
        "step": step,
        "sequences": 24 * step,
        "layout": {},
        "optimizer_steps": {},
        "parameters": {},
        "files": {},
        "extra": {"data": state},
    }
    write_manifest(folder.begin(step), document)
    folder.publish(step)
    folder.prune(2)


def child(feeds: object, folder: Path, workers: int, last: int) -> None:
    """Read the newest checkpoint, check that the data is the same, and stream on."""
    feed = feeds.open_feed(folder, workers=workers)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    newest, step = checkpoints.newest(), 0
    if newest is not None:
        manifest = read_manifest(newest)
        step = manifest.step
        feed.check_state(manifest.extra["data"], step=step)
    lines = os.open(folder / "stream.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    while True:
        digest = feeds.step_hash(*feed.get(step))
        os.write(lines, f"{step} {digest}\n".encode())
        while step == last:
            signal.pause()
        step += 1
        if step % SAVE_EVERY == 0:
            save(checkpoints, step, feed.state())


def main() -> None:
    """One child at a time, its process id on stdout."""
    folder = Path(sys.argv[1])
    feeds = _load_feeds()
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(feeds, folder, *(int(number) for number in line.split()))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
