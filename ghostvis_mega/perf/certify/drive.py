"""Starting ranks, launch after launch, until every layout has a verdict. Needs no torch.

A layout that raises or hangs ends its launch, since the other ranks then wait for ever; it is red,
and a new launch goes on with the next one.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ghostvis_mega.perf.certify.own_settings import load_own
from ghostvis_mega.perf.certify.report import Outcome
from ghostvis_mega.perf.certify.request import Entry, Request
from ghostvis_mega.utils.launch import EXIT_HANG, launch_self

log = logging.getLogger(__name__)

HANG_S = 180.0
"""Silence of a rank that counts as a hang, in layouts that come with the program."""
START_S = 300.0
"""Time limit of a launch beside that of its layouts: imports and references."""
STEP_S = 30.0
"""Share of each step of a layout that comes with the program in the time limit of a launch."""


class Journal:
    """What a launch has begun and finished, line by line in a file that outlives it."""

    def __init__(self, folder: Path):
        self.path = folder / "journal.jsonl"

    def begin(self, entry: Entry) -> None:
        """Note that a layout runs now."""
        self._append({"begin": entry.name, "planted": entry.planted})

    def end(self, entry: Entry, row: dict) -> None:
        """Note its figures."""
        self._append({"end": entry.name, "planted": entry.planted, "row": row})

    def _append(self, line: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> tuple[dict[tuple[str, str], dict], tuple[str, str] | None]:
        """Rows by (name, planted), and what was begun and not finished."""
        rows: dict[tuple[str, str], dict] = {}
        open_entry = None
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            item = json.loads(line)
            if "begin" in item:
                open_entry = (item["begin"], item["planted"])
            else:
                rows[item["end"], item["planted"]] = item["row"]
                open_entry = None
        return rows, open_entry


def certify(
    request: Request, *, device: str, progress: Callable[[str], None]
) -> dict[Entry, Outcome]:
    """Run all entries of a request, each in a launch of as many ranks as it wants.

    Args:
        request: Entries of any numbers of ranks; its folder is empty.
        device: `cpu` or `cuda`.
        progress: Told what is being started.
    """
    outcomes: dict[Entry, Outcome] = {}
    for number, ranks in enumerate(sorted({entry.ranks for entry in request.entries})):
        left = [entry for entry in request.entries if entry.ranks == ranks]
        attempt = 0
        while left:
            folder = request.folder / f"launch{number}_{attempt}"
            folder.mkdir(parents=True)
            progress(f"{len(left)} layouts and faults on {ranks} processes")
            found = _launch(replace(request, entries=tuple(left), folder=folder), device=device)
            outcomes |= found
            left = [entry for entry in left if entry not in found]
            attempt += 1
    return outcomes


def patience_s(request: Request) -> float:
    """Silence that counts as a hang; of somebody's own run what she says, if that is more."""
    if request.config is None:
        return HANG_S
    return max(HANG_S, *(load_own(request, entry).train.timeout_s for entry in request.entries))


def limit_s(request: Request) -> float:
    """Time limit of a launch. Ranks find a hang themselves, by their silence, and sooner.

    How long a model of somebody's own takes is not known here: each layout and its reference may
    have as long for every step as a rank may be silent.
    """
    share = STEP_S if request.config is None else 2 * patience_s(request)
    return START_S + share * request.steps * len(request.entries)


def _launch(request: Request, *, device: str) -> dict[Entry, Outcome]:
    """One launch; at least one entry gets an outcome."""
    path = request.folder / "request.json"
    request.write(path)
    started = time.monotonic()
    code = launch_self(
        ["certify", "--request", str(path)],
        processes=request.ranks,
        device=device,
        timeout_s=limit_s(request),
    )
    rows, unfinished = Journal(request.folder).read()
    found = {
        entry: Outcome(entry.name, row=rows[entry.name, entry.planted], fault=entry.fault)
        for entry in request.entries
        if (entry.name, entry.planted) in rows
    }
    log.info("launch ended with %d after %.0f s", code, time.monotonic() - started)
    if code == 0 and len(found) == len(request.entries):
        return found
    why = failure_reason(request.folder, code)
    stopped = [
        entry
        for entry in request.entries
        # Without a layout begun the launch itself failed: another one would as well.
        if entry not in found and unfinished in (None, (entry.name, entry.planted))
    ]
    return found | {entry: Outcome(entry.name, failure=why, fault=entry.fault) for entry in stopped}


def note_error(folder: Path, *, rank: int, text: str) -> None:
    """In a rank: leave its error for `failure_reason`."""
    (folder / f"error{rank}.json").write_text(
        json.dumps({"time": time.time(), "rank": rank, "text": text})
    )


def failure_reason(folder: Path, code: int) -> str:
    """One line: the first error of any rank, else how the launch ended."""
    errors = [json.loads(path.read_text()) for path in folder.glob("error*.json")]
    if errors:
        first = min(errors, key=lambda error: error["time"])
        return f"rank {first['rank']}: {first['text']}"
    if code == EXIT_HANG:
        return "it hangs; the ranks that others wait for are named above"
    return f"a rank ended with code {code}; its output is above"
