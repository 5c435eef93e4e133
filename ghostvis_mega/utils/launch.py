"""Run something as several ranks on this machine; a hang is killed and named, rank by rank.

As under torchrun each rank finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its
environment, and the first rank that fails ends all others. torchrun itself would be one more
process that imports torch, and it knows of no hang but its collectives' time limits.

`python -m ghostvis_mega.utils.launch` is also the entry point of each rank: it sets up the stack
dump and then runs the script or module.
"""

import contextlib
import ctypes
import faulthandler
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[2]
"""Where `ghostvis_mega` lies."""
TRAIN_SCRIPT = PACKAGES / "examples" / "pretrain_vlm.py"
"""What people start a run with."""
EXIT_HANG = 70
"""Exit code of `launch_self` when time is up, as of a run that its watchdog ends."""
_PORTS = (15000, 32000)
"""Below the range of ports that systems hand out by themselves."""
_PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>."""
_DUMP_GRACE_S = 1.0
_POLL_S = 0.1
_OUTPUT_CHARACTERS = 6000
WAITS_FOR_OTHERS = re.compile(
    r"torch/distributed/|megatron/core/pipeline_parallel/p2p_communication\.py|deepspeed/comm/"
    r"|ghostvis_mega/parallel/trace\.py"
)
"""Files whose functions wait for other ranks."""
_LIBRARIES = (sysconfig.get_path("stdlib"), str(Path(__file__).resolve()), "<frozen")


class RankError(RuntimeError):
    """A rank ended with an error; the message holds the end of its output."""

    def __init__(self, message: str, *, code: int, hung: bool = False):
        self.code = code
        self.hung = hung
        """Whether a rank's own watchdog ended it."""
        super().__init__(message)


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


def device_environment(device: str) -> dict[str, str]:
    """Variables that hide GPUs from a process on the `cpu`; none for other devices."""
    return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}


def launch_self(
    argv: Sequence[str],
    *,
    processes: int,
    device: str,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `python -m ghostvis_mega ARGV` as several ranks of this machine.

    Rank 0 writes to this process's output; of the others only what failed or hung is shown, on
    standard error.

    Args:
        argv: Arguments of the command line, such as `["certify", "--layouts", "cpu"]`; the ranks
            know from WORLD_SIZE that they have been started.
        processes: Number of ranks.
        device: `cpu` hides GPUs from them; `cuda` gives each the GPU of its number.
        timeout_s: From the start to the end of the slowest rank.
        environment: Variables beside those of this process.

    Returns:
        0; else the code of the first rank that failed, or `EXIT_HANG`.
    """
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with tempfile.TemporaryDirectory(prefix="ghostvis-ranks-") as folder:
        try:
            run_ranks(
                ["-m", "ghostvis_mega", *argv],
                ranks=processes,
                timeout_s=timeout_s,
                folder=Path(folder),
                environment=threads | device_environment(device) | dict(environment or {}),
                first_output=1,
            )
        except RankHang as hang:
            sys.stderr.write(f"{hang}\n")
            return EXIT_HANG
        except RankError as failure:
            sys.stderr.write(f"{failure}\n")
            return failure.code
    return 0


def run_ranks(
    target: Sequence[str],
    *,
    ranks: int,
    timeout_s: float,
    folder: Path,
    environment: Mapping[str, str],
    first_output: int | None = None,
) -> None:
    """Run a script or module on `ranks` processes of this machine; none outlives the call.

    Args:
        target: `["-m", NAME, ...]` or `[SCRIPT, ...]`; it joins the process group itself.
        ranks: Number of processes.
        timeout_s: From the start to the end of the slowest rank.
        folder: Empty or new; takes the output and the stacks.
        environment: Variables beside those of this process.
        first_output: File descriptor for what rank 0 prints, its errors then going where this
            process's go; None: into `folder`.

    Raises:
        RankError: A rank failed.
        RankHang: Time is up.
    """
    name = target[1] if target[0] == "-m" else Path(target[0]).name
    with started_ranks(
        target,
        ranks=ranks,
        fuse_s=timeout_s + 60,
        folder=folder,
        environment=environment,
        first_output=first_output,
    ) as processes:
        wait_ranks(name, processes, folder, timeout_s)


@contextlib.contextmanager
def started_ranks(
    target: Sequence[str],
    *,
    ranks: int,
    fuse_s: float,
    folder: Path,
    environment: Mapping[str, str],
    first_output: int | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """Processes of `run_ranks`, killed with all that they have started where the block ends.

    Args:
        target, ranks, folder, environment, first_output: As for `run_ranks`.
        fuse_s: After which a rank ends by itself, should this process be killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = {
        **os.environ,
        **environment,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")])),
        "LAUNCH_FOLDER": str(folder),
        "LAUNCH_FUSE_S": str(fuse_s),
        "LAUNCH_PID": str(os.getpid()),
    }
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            output = None if rank else first_output
            processes.append(_start(target, rank, folder, environment, output))
        yield processes
    finally:
        for process in processes:
            # The rank and whatever it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(
    target: Sequence[str],
    rank: int,
    folder: Path,
    environment: Mapping[str, str],
    output: int | None,
) -> subprocess.Popen:
    """One rank, in a session of its own."""
    command = [sys.executable, "-m", "ghostvis_mega.utils.launch", *target]
    if output is not None:
        return subprocess.Popen(command, env=environment, stdout=output, start_new_session=True)
    with _output_file(folder, rank).open("w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def free_port() -> int:
    """A port for the ranks to meet at, seconds from now.

    Not one that the system would hand out: by then it might have, to any connection.
    """
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_ranks(
    name: str,
    processes: list[subprocess.Popen],
    folder: Path,
    timeout_s: float,
    *,
    began: float | None = None,
) -> None:
    """Wait for the end of all ranks of `started_ranks`.

    Args:
        name: For messages.
        processes: The ranks.
        folder: As given to `started_ranks`.
        timeout_s: From `began` on.
        began: As `time.monotonic` gives it; None: now.

    Raises:
        RankError: A rank failed.
        RankHang: Time is up.
    """
    end = (time.monotonic() if began is None else began) + timeout_s
    failed: list[int] = []
    running = True
    while running and not failed:
        # One look at each rank: asked twice, a rank may fail in between and be seen by neither.
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        running = None in codes
        if running and not failed:
            if time.monotonic() > end:
                raise RankHang(_describe_hang(name, processes, folder, timeout_s))
            time.sleep(_POLL_S)
    if failed:
        # More than one, where another lost its connection to the first: their order cannot be told.
        raise RankError(
            "\n".join(_describe_failure(name, processes, rank, folder) for rank in failed),
            code=max(processes[failed[0]].returncode, 1),
            hung=any(processes[rank].returncode == EXIT_HANG for rank in failed),
        )


def _describe_failure(name: str, processes: list[subprocess.Popen], rank: int, folder: Path) -> str:
    path = _output_file(folder, rank)
    tail = path.read_text(errors="replace")[-_OUTPUT_CHARACTERS:] if path.exists() else ""
    code = processes[rank].returncode
    return f"{name}: rank {rank} of {len(processes)} ended with {code}\n{tail}".rstrip()


def _describe_hang(
    name: str, processes: list[subprocess.Popen], folder: Path, timeout_s: float
) -> str:
    ranks = range(len(processes))
    for process in processes:
        process.send_signal(signal.SIGUSR2)
    time.sleep(_DUMP_GRACE_S)
    stacks = {
        rank: (_stack_file(folder, rank), read_stack(_stack_file(folder, rank))) for rank in ranks
    }
    running = {rank: frames for rank, (_, frames) in stacks.items() if frames}
    guilty = [
        rank for rank, frames in running.items() if not WAITS_FOR_OTHERS.search(frames[0].path)
    ] or list(running)
    lines = [
        f"{name} did not end within {timeout_s:g} s; "
        f"it hangs on rank {', '.join(map(str, guilty))}:"
    ]
    for rank in guilty + [rank for rank in ranks if rank not in guilty]:
        lines.append(f"  rank {rank} {_place(running.get(rank, []), rank in guilty)}")
    lines += [f"stack of rank {rank}:\n{stacks[rank][0].read_text()}" for rank in guilty]
    return "\n".join(lines)


def _place(frames: list[Frame], guilty: bool) -> str:
    if not frames:
        return "has ended, or is not in Python yet"
    ours = next((frame for frame in frames if _is_ours(frame.path)), None)
    called = f", called by {ours}" if ours not in (None, frames[0]) else ""
    return f"{'is' if guilty else 'waits for others'} in {frames[0]}{called}"


def _is_ours(path: str) -> bool:
    """Whether a file is neither Python's nor a package's."""
    if path.startswith(str(PACKAGES / "ghostvis_mega")) and not path.startswith(_LIBRARIES):
        return True
    return "site-packages" not in path and not path.startswith(_LIBRARIES)


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


def _die_with(launcher: int) -> None:
    """Be killed when the process that launched this rank is gone, however it ended.

    By PR_SET_PDEATHSIG of Linux's prctl(2).
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != launcher:
        sys.exit(1)  # it went before the call


def main() -> None:
    """One rank: be ready to tell where it hangs, then run the script or module."""
    target = sys.argv[1:]
    _die_with(int(os.environ["LAUNCH_PID"]))
    with _stack_file(Path(os.environ["LAUNCH_FOLDER"]), int(os.environ["RANK"])).open("w") as stack:
        # SIGUSR1 asks a training run to save and to stop.
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
        # For systems without Linux's signal, should the launching process be killed.
        faulthandler.dump_traceback_later(float(os.environ["LAUNCH_FUSE_S"]), exit=True)
        if target[0] == "-m":
            sys.argv = target[1:]
            runpy.run_module(target[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = target
            sys.path[0] = str(Path(target[0]).parent)
            runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main()
