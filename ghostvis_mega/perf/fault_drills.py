"""What a run does when it is asked to stop, and when one of its ranks stops answering."""

import logging
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ghostvis_mega.perf.fault_run import ENDLESS, FaultRun, lost_or_repeated
from ghostvis_mega.train.hang import REPORT
from ghostvis_mega.train.signals import EXIT_REQUEUE
from ghostvis_mega.train.watchdog import EXIT_CODE
from ghostvis_mega.utils.figures import Figure, at_most, measured

log = logging.getLogger(__name__)

BEFORE, AFTER = 3, 2
"""Steps before the fault and after the resume."""
SLACK_S = 5.0
"""After `train.timeout_s`, in which a hang must be found and reported."""
_STEP_TIMEOUT_S = 300.0


def signal_drill(run: FaultRun, *, ranks: Sequence[int], number: signal.Signals) -> list[Figure]:
    """Send a signal to some ranks in mid-step; all must save, end with 85, and go on later.

    Args:
        run: Not started yet.
        ranks: To signal. The first is held with SIGSTOP meanwhile, so that no step ends between the
            look at the metrics and the signal.
        number: SIGTERM or SIGUSR1; SIGKILL is the control, which must miss bars.

    Raises:
        TrainingError: A start did not come as far as it should.
    """
    settings = run.settings(steps=ENDLESS, save_every=0, timeout_s=_STEP_TIMEOUT_S)
    with run.started("first", settings) as started:
        run.train_to("first", started, BEFORE)
        known = run.freeze(started[ranks[0]])
        log.info("%s to rank %s after step %d", number.name, _list(ranks), known)
        sent = time.monotonic()
        for rank in ranks:
            started[rank].send_signal(number)
        started[ranks[0]].send_signal(signal.SIGCONT)
        codes = _codes(run, started, number)
        seconds = time.monotonic() - sent
    done, saved = len(run.rows()), run.newest()
    rows = [
        at_most("ranks that ended otherwise than with 85", _others(codes, EXIT_REQUEUE), "", 0),
        at_most("steps after the signal", done - known, "steps", 1),
        at_most("steps that are in no checkpoint", done - saved, "steps", 0),
        measured("from the signal to the end of the last rank", seconds, "s"),
    ]
    return rows + _resume(run, newest=saved, known=done)


def _codes(run: FaultRun, started: list[subprocess.Popen], number: signal.Signals) -> list[int]:
    if number != signal.SIGKILL:
        return run.end_of("first", started, seconds=run.start_timeout_s)
    for process in started:
        process.kill()
    return [process.wait() for process in started]


def hang_drill(run: FaultRun, *, rank: int, timeout_s: float, fault: bool) -> list[Figure]:
    """Stop one rank with SIGSTOP; the others must find it, name it, and end.

    Args:
        run: Not started yet.
        rank: To stop.
        timeout_s: Of a step.
        fault: Stop none, so that no hang can be found: the control, which must miss bars.

    Raises:
        TrainingError: A start did not come as far as it should.
    """
    settings = run.settings(steps=ENDLESS, save_every=BEFORE, timeout_s=timeout_s)
    limit = timeout_s + SLACK_S
    with run.started("first", settings) as started:
        run.train_to("first", started, BEFORE + 1)
        log.info("SIGSTOP to rank %d after step %d", rank, len(run.rows()))
        began = time.time()
        if not fault:
            started[rank].send_signal(signal.SIGSTOP)
        others = [process for other, process in enumerate(started) if other != rank]
        end = time.monotonic() + limit + SLACK_S
        while time.monotonic() < end and any(process.poll() is None for process in others):
            time.sleep(0.05)
        codes = [process.poll() for process in others]
    found = sorted((run.output / "hangs").rglob(REPORT))
    # `None` stands for ranks that were still running when the time was up.
    rows = [
        at_most("other ranks that ended otherwise than with 70", _others(codes, EXIT_CODE), "", 0)
    ]
    if not found:
        return [*rows, measured("from the stop to the report", None, "s", bar=limit, ok=False)]
    seconds = found[-1].stat().st_mtime - began
    rows.append(at_most("from the stop to the report", seconds, "s", limit))
    rows += judge_report(found[-1].read_text(), rank=rank, processes=run.processes)
    return rows + _resume(run, newest=run.newest(), known=len(run.rows()))


def judge_report(text: str, *, rank: int, processes: int) -> list[Figure]:
    """Whether a report names the rank, and the last call and the stacks of all others."""
    first, *lines = text.splitlines()
    others = [other for other in range(processes) if other != rank]
    of = {o: next((x for x in lines if x.startswith(f"  rank {o}: ")), "") for o in others}
    calls = [o for o in others if "last call: " not in of[o] or " in group " not in of[o]]
    stacks = [o for o in others if f"stacks of rank {o}:\n" not in text]
    return [
        measured("the report says", first, ok=first == f"hang: rank {rank} does not answer."),
        at_most("other ranks without a last call", len(calls), "", 0),
        at_most("other ranks without stacks", len(stacks), "", 0),
        measured("last call of the first other rank", of[others[0]].strip()),
    ]


def _resume(run: FaultRun, *, newest: int, known: int) -> list[Figure]:
    """Start again: the steps behind the newest checkpoint, and a few more."""
    steps = max(newest, known) + AFTER
    settings = run.settings(steps=steps, save_every=0, timeout_s=_STEP_TIMEOUT_S)
    with run.started("again", settings) as started:
        codes = run.end_of("again", started, seconds=run.start_timeout_s)
    said = _said(run.folder / "again")
    return [
        at_most("ranks that failed after the resume", _others(codes, 0), "", 0),
        measured(
            "goes on after step",
            newest,
            ok=newest > 0 and f"step-{newest:08d} after step {newest}\n" in said,
        ),
        at_most("steps lost or done twice", lost_or_repeated(run.rows(), steps=steps), "", 0),
    ]


def _said(folder: Path) -> str:
    return (folder / "output0.txt").read_text(errors="replace")


def _others(codes: Sequence[int | None], expected: int) -> int:
    return sum(code != expected for code in codes)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
