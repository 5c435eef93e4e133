"""Forks feeds that continue from a state file; the test kills them. `python resume_worker.py DIR`.

Reads one line a trial from stdin, forks, and the child appends `STEP HASH` lines until it dies.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from ghostvis_mega.utils.files import atomic_write_json  # noqa: E402

SAVE_EVERY = 3


def _load_feeds():  # noqa: ANN202
    spec = importlib.util.spec_from_file_location("feeds", HERE / "feeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def child(feeds: object, folder: Path, workers: int) -> None:
    """Read the saved step, check that the data is the same, and stream on."""
    feed = feeds.open_feed(folder, workers=workers)
    file = folder / "state.json"
    step = 0
    if file.is_file():
        saved = json.loads(file.read_text())
        step = saved["step"]
        feed.check_state(saved["data"], step=step)
    lines = os.open(folder / "stream.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    while True:
        digest = feeds.step_hash(*feed.get(step))
        os.write(lines, f"{step} {digest}\n".encode())
        step += 1
        if step % SAVE_EVERY == 0:
            atomic_write_json(file, {"step": step, "data": feed.state()})


def main() -> None:
    """One child at a time, its process id on stdout."""
    folder = Path(sys.argv[1])
    feeds = _load_feeds()
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(feeds, folder, int(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
