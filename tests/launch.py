"""Run a worker script as several gloo ranks; a hang is killed and named, rank by rank."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghostvis_mega.utils.launch import RankError, RankHang, device_environment, run_ranks

__all__ = ["ROOT", "RankError", "RankHang", "fork_ranks", "launch", "write_result"]

ROOT = Path(__file__).resolve().parents[1]


def launch(
    worker: Path, *, ranks: int, timeout_s: float, folder: Path, args: Sequence[str] = ()
) -> Any:
    """Run `worker` on `ranks` processes on this machine's CPUs.

    Args:
        worker: Python script; it joins the group itself (`init_process_group("gloo")`).
        ranks: Number of processes.
        timeout_s: From the start to the end of the slowest rank.
        folder: Empty or new; takes the output and the stacks.
        args: Command line of the script.

    Returns:
        What the worker gave to `write_result`; None if it gave nothing.

    Raises:
        RankError: A rank failed.
        RankHang: Time is up.
    """
    run_ranks(
        [str(worker), *args],
        ranks=ranks,
        timeout_s=timeout_s,
        folder=folder,
        environment={"OMP_NUM_THREADS": "1", **device_environment("cpu")},
    )
    result = folder / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


def write_result(value: Any) -> None:
    """In a worker, on one rank: give `value` (JSON) to the caller of `launch`."""
    (Path(os.environ["LAUNCH_FOLDER"]) / "result.json").write_text(json.dumps(value))


def fork_ranks(main: Callable[[], None], world: int) -> None:
    """In a worker that is launched as one rank: become several that each run `main`.

    What all of them import, several seconds of it, is imported once.
    """
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
    children = []
    for rank in range(1, world):
        child = os.fork()
        if child == 0:
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            code = 1
            try:
                main()
                code = 0
            finally:
                traceback.print_exc() if code else None
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    main()
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    assert not failed, f"{len(failed)} ranks failed"
