"""Run a worker script as several gloo ranks; a hang is killed and named, rank by rank.

As under torchrun the worker finds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment,
and the first rank that fails ends all others. torchrun itself would be one more process that
imports torch, and it knows of no hang but its collectives' time limits.

This file is also the entry point of each rank: it sets up the stack dump and then runs the worker.
"""

import contextlib
import faulthandler
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_DUMP_GRACE_S = 1.0
_POLL_S = 0.1
_OUTPUT_CHARACTERS = 6000
_WAITS = re.compile(
    r"torch/distributed/|megatron/core/pipeline_parallel/p2p_communication\.py|deepspeed/comm/"
)
"""Files whose functions wait for other ranks."""


class RankError(RuntimeError):
    """A rank ended with an error; the message holds the end of its output."""


class RankHang(RuntimeError):
    """Time is up; the message names the ranks that the others wait for, and where each is."""


@dataclass(frozen=True)
class Frame:
    """One line of a Python stack."""

    path: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({self.path.rsplit('/', 1)[-1]}:{self.line})"


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
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "LAUNCH_FOLDER": str(folder),
        "LAUNCH_FUSE_S": str(timeout_s + 60),
    }
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            with _output_file(folder, rank).open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(worker), *args],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        _wait(worker, processes, folder, timeout_s)
    finally:
        for process in processes:
            # The rank and whatever it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return json.loads(result.read_text()) if result.exists() else None


def _wait(worker: Path, processes: list[subprocess.Popen], folder: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    failed: list[int] = []
    while not failed and any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            raise RankHang(_describe_hang(worker, processes, folder, timeout_s))
        time.sleep(_POLL_S)
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
    if failed:
        # More than one, where another lost its connection to the first: their order cannot be told.
        raise RankError(
            "\n".join(_describe_failure(worker, processes, rank, folder) for rank in failed)
        )


def _describe_failure(
    worker: Path, processes: list[subprocess.Popen], rank: int, folder: Path
) -> str:
    output = _output_file(folder, rank).read_text(errors="replace")
    code = processes[rank].returncode
    tail = output[-_OUTPUT_CHARACTERS:]
    return f"{worker.name}: rank {rank} of {len(processes)} ended with {code}\n{tail}"


def write_result(value: Any) -> None:
    """In a worker, on one rank: give `value` (JSON) to the caller of `launch`."""
    (Path(os.environ["LAUNCH_FOLDER"]) / "result.json").write_text(json.dumps(value))


def _describe_hang(
    worker: Path, processes: list[subprocess.Popen], folder: Path, timeout_s: float
) -> str:
    ranks = range(len(processes))
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    time.sleep(_DUMP_GRACE_S)
    stacks = {
        rank: (_stack_file(folder, rank), read_stack(_stack_file(folder, rank))) for rank in ranks
    }
    running = {rank: frames for rank, (_, frames) in stacks.items() if frames}
    guilty = [
        rank for rank, frames in running.items() if not _WAITS.search(frames[0].path)
    ] or list(running)
    lines = [
        f"{worker.name} did not end within {timeout_s:g} s; "
        f"it hangs on rank {', '.join(map(str, guilty))}:"
    ]
    for rank in guilty + [rank for rank in ranks if rank not in guilty]:
        lines.append(f"  rank {rank} {_place(running.get(rank, []), rank in guilty)}")
    lines += [f"stack of rank {rank}:\n{stacks[rank][0].read_text()}" for rank in guilty]
    return "\n".join(lines)


def _place(frames: list[Frame], guilty: bool) -> str:
    if not frames:
        return "has ended, or is not in Python yet"
    ours = next(
        (
            frame
            for frame in frames
            if frame.path.startswith(str(ROOT)) and ".venv" not in frame.path
        ),
        None,
    )
    called = f", called by {ours}" if ours not in (None, frames[0]) else ""
    return f"{'is' if guilty else 'waits for others'} in {frames[0]}{called}"


def read_stack(path: Path) -> list[Frame]:
    """Frames of the main thread in a faulthandler dump, innermost first; empty without a dump."""
    text = path.read_text() if path.exists() else ""
    _, found, rest = text.partition("Current thread")
    frames = []
    for line in rest.splitlines()[1:] if found else []:
        match = re.match(r'\s+File "(.*)", line (\d+) in (.*)', line)
        if match is None:
            break
        frames.append(Frame(path=match[1], line=int(match[2]), function=match[3]))
    return frames


def _output_file(folder: Path, rank: int) -> Path:
    return folder / f"output{rank}.txt"


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack{rank}.txt"


def main() -> None:
    """One rank: be ready to tell where it hangs, then run the worker as a script."""
    worker = sys.argv[1]
    with _stack_file(Path(os.environ["LAUNCH_FOLDER"]), int(os.environ["RANK"])).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        # Should the launching process be killed, no rank outlives it for long.
        faulthandler.dump_traceback_later(float(os.environ["LAUNCH_FUSE_S"]), exit=True)
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(worker).parent)
        runpy.run_path(worker, run_name="__main__")


if __name__ == "__main__":
    main()
