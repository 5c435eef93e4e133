"""One hostile file at one door, in a process of its own that is watched and measured.

The process is forked from one that has imported everything, so a trial takes milliseconds. Python's
audit hook sees what a harmless reader never does: a program started, an address connected to, a
class looked up for a pickle, a file opened for writing elsewhere.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ghostvis_mega.utils.errors import GhostVisError

Door = Callable[[Path], object]
"""Reads a file or folder as the system does; raises a GhostVisError to refuse it."""

MIB = 1 << 20
_FORBIDDEN = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|startfile)|subprocess\.Popen|socket\.(connect|getaddrinfo)"
    r"|urllib\.Request|pickle\.find_class|ctypes\.dlopen|shutil\.unpack_archive"
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ROOM_BYTES = 4 << 30
"""Address space beyond the process's own: it ends before the machine suffers."""


@dataclass(frozen=True)
class Limits:
    """What a refusal may cost."""

    cpu_s: float = 2.0
    memory_mib: float = 256.0
    wall_s: float = 120.0
    """Then it hangs. CPU time is what is judged: it does not depend on what else runs."""
    message: int = 2000
    """Characters: a sentence, not the file."""


@dataclass
class Outcome:
    """How a trial ended."""

    ended: str = "died"
    """refused, accepted, crashed (an error that is not for users), hung or died."""
    message: str = ""
    cpu_s: float = 0.0
    memory_mib: float = 0.0
    """Beyond what the process had before."""
    events: list[str] = field(default_factory=list)

    def problem(self, limits: Limits) -> str | None:
        """Which rule is broken; None if the file was refused as it should be."""
        if self.events:
            return f"it did what no reader does: {', '.join(self.events[:4])}"
        if self.ended != "refused":
            return f"{self.ended}: {self.message[:200]}"
        if not self.message or len(self.message) > limits.message or "Traceback" in self.message:
            return f"refused without a sentence: {self.message[:200]!r}"
        if self.cpu_s > limits.cpu_s:
            return f"refused after {self.cpu_s:.1f} s of CPU time"
        if self.memory_mib > limits.memory_mib:
            return f"refused with {self.memory_mib:.0f} MiB of memory"
        return None


def run_trial(door: Door, path: Path, *, writable: Path, limits: Limits) -> Outcome:
    """Open `path` at `door` in a child process.

    Args:
        door: What reads it.
        path: The file or folder.
        writable: Folder that the door may write to.
        limits: Time and memory.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Threads of numerical libraries; the child uses none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        _child(door, path, writable, writer)
    os.close(writer)
    return _collect(child, reader, limits)


def _child(door: Door, path: Path, writable: Path, writer: int) -> None:
    """Never returns."""
    outcome = Outcome()
    status = 1
    logging.disable(logging.CRITICAL)
    # A module that is first needed here would be cached beside its source.
    sys.dont_write_bytecode = True
    try:
        used = _memory("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_BYTES, used + _ROOM_BYTES))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, began = _memory("VmRSS"), time.process_time()
        sys.addaudithook(_watch(outcome.events, writable))
        outcome.ended, outcome.message = _visit(door, path)
        outcome.cpu_s = time.process_time() - began
        outcome.memory_mib = max(0, _memory("VmHWM") - before) / MIB
        os.write(writer, json.dumps(asdict(outcome)).encode())
        status = 0
    finally:
        os._exit(status)


def _visit(door: Door, path: Path) -> tuple[str, str]:
    try:
        door(path)
    except GhostVisError as error:
        return "refused", str(error)
    # Whatever else it raises is what this is looking for.
    except BaseException as error:  # noqa: BLE001
        return "crashed", f"{type(error).__name__}: {error}"[:4000]
    return "accepted", ""


def _watch(events: list[str], writable: Path) -> Callable[[str, tuple[object, ...]], None]:
    allowed = os.path.realpath(writable)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if _FORBIDDEN.match(event):
            events.append(f"{event}{arguments[:2]!r}"[:200])
        elif event == "open" and isinstance(arguments[0], str | bytes):
            name, mode, flags = os.fsdecode(arguments[0]), arguments[1], arguments[2]
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            writes = writes or (isinstance(flags, int) and flags & _WRITES)
            if writes and not os.path.realpath(name).startswith((allowed, "/dev/")):
                events.append(f"open for writing {name}"[:200])

    return hook


def _memory(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024


def _collect(child: int, reader: int, limits: Limits) -> Outcome:
    """What the child has written, once it has ended or its time is up."""
    deadline, status, hung = time.monotonic() + limits.wall_s, None, False
    with os.fdopen(reader, "rb") as pipe:
        os.set_blocking(reader, False)
        text = b""
        while status is None:
            text += pipe.read() or b""
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = code
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                hung, status = True, os.waitpid(child, 0)[1]
            else:
                time.sleep(0.002)
        text += pipe.read() or b""
    if hung:
        return Outcome(ended="hung", message=f"no answer in {limits.wall_s:g} s")
    if status or not text:
        return Outcome(ended="died", message=f"wait status {status}")
    return Outcome(**json.loads(text))
