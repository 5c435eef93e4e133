"""The ranks' part: every entry of a request, one after the other."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.certify.breaking import measure_broken
from ghostvis_mega.perf.certify.drive import Journal
from ghostvis_mega.perf.certify.lab import Case, Lab, Row
from ghostvis_mega.perf.certify.problem import run_of
from ghostvis_mega.perf.certify.request import SETS, Entry, Request


def first_run(request: Request) -> RunConfig:
    """Settings to open the world with: those of any layout."""
    return run_of(SETS[request.set]()[0], request.folder)


def measure_all(
    request: Request, groups: Groups, *, device: torch.device, progress: Callable[[str], None]
) -> list[Row]:
    """Measure all entries; collective.

    Args:
        request: Of this launch.
        groups: Of the open world.
        device: Of this process.
        progress: Told what is being done.

    Returns:
        A row an entry, in their order; those of rank 0 are also in the journal.
    """
    lab = Lab(request.folder, groups=groups, device=device, steps=request.steps)
    journal = Journal(request.folder)
    progress("computing the references")
    cases = {entry: _case(lab, request, entry) for entry in request.entries}
    lab.solve_all(cases.values())
    rows = []
    for entry, case in cases.items():
        progress(entry.name)
        if dist.get_rank() == 0:
            journal.begin(entry)
        fault = entry.fault
        row = lab.measure(case) if fault is None else measure_broken(lab, fault)
        if dist.get_rank() == 0:
            journal.end(entry, row)
        rows.append(row)
    return rows


def _case(lab: Lab, request: Request, entry: Entry) -> Case:
    if entry.fault is not None:
        return lab.case(entry.fault.layout)
    layout = next(layout for layout in SETS[request.set]() if layout.name == entry.name)
    return lab.case(layout)
