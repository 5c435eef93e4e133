"""The ranks' part: every entry of a request, one after the other."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ghostvis_mega.config.schema import ParallelConfig, RunConfig
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.certify.breaking import measure_broken
from ghostvis_mega.perf.certify.compare import Row
from ghostvis_mega.perf.certify.drive import Journal, patience_s
from ghostvis_mega.perf.certify.lab import Case, Lab
from ghostvis_mega.perf.certify.own import own_cases
from ghostvis_mega.perf.certify.own_settings import load_own
from ghostvis_mega.perf.certify.problem import run_of
from ghostvis_mega.perf.certify.report import Outcome, brief
from ghostvis_mega.perf.certify.request import SETS, Entry, Request


def opening_run(request: Request) -> RunConfig:
    """Settings to open the world with: those of any layout, but as patient as the most patient, and
    with as many ranks on a GPU as the request says."""
    if request.config is not None:
        run = load_own(request, request.entries[0])
    else:
        run = run_of(SETS[request.set]()[0], request.folder)
    update = {"timeout_s": patience_s(request)}
    if request.ranks_per_gpu > 1:
        update["ranks_per_gpu"] = request.ranks_per_gpu
    train = run.train.model_copy(update=update)
    return run.model_copy(update={"train": train, "parallel": ParallelConfig()})


def measure_all(
    request: Request,
    groups: Groups,
    *,
    device: torch.device,
    progress: Callable[[str], None],
    alive: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure all entries; collective.

    Args:
        request: Of this launch.
        groups: Of the open world.
        device: Of this process.
        progress: Told what is being done, and what came out, so that a set that is cut short has
            said as much as it knew.
        alive: Told of every step, and of every row of a reference.

    Returns:
        A row an entry, in their order; those of rank 0 are also in the journal.
    """
    lab = Lab(request.folder, groups=groups, device=device, steps=request.steps, alive=alive)
    journal = Journal(request.folder)
    progress("computing the references")
    cases = cases_of(request, lab)
    lab.solve_all(cases.values())
    rows = []
    for number, (entry, case) in enumerate(cases.items(), start=1):
        progress(f"{number} of {len(cases)}: {entry.name}")
        if dist.get_rank() == 0:
            journal.begin(entry)
        fault = entry.fault
        row = lab.measure(case) if fault is None else measure_broken(lab, fault)
        if dist.get_rank() == 0:
            journal.end(entry, row)
        progress(brief(Outcome(entry.name, row=row, fault=fault)))
        rows.append(row)
    return rows


def cases_of(request: Request, lab: Lab) -> dict[Entry, Case]:
    """What each entry runs."""
    if request.config is not None:
        return own_cases(request)
    layouts = {layout.name: layout for layout in SETS[request.set]()}
    return {
        entry: lab.case(entry.fault.layout if entry.fault is not None else layouts[entry.name])
        for entry in request.entries
    }
