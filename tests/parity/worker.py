"""One rank of the parity launch: layouts, faults and skipped steps, into one JSON file."""

import logging
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.engine import step as engine_step
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.perf.certify.breaking import measure_broken
from ghostvis_mega.perf.certify.faults import FAULTS
from ghostvis_mega.perf.certify.lab import Lab
from tests.launch import write_result
from tests.parity.chosen import KEPT, LAYOUTS, ROUNDED, ROUNDED_FAULTS, SKIPS
from tests.parity.skips import measure_kept_gradients, measure_skips


def main() -> None:
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    torch.set_num_threads(1)
    apply_cpu_shim()
    dist.init_process_group("gloo")
    wanted = sys.argv[1:]
    layouts, skips, rounded, faults, rounded_faults = (
        [entry for entry in entries if not wanted or any(part in entry.name for part in wanted)]
        for entries in (LAYOUTS, SKIPS, ROUNDED, FAULTS, ROUNDED_FAULTS)
    )
    lab = Lab(Path(os.environ["LAUNCH_FOLDER"]))
    planted = [fault.layout for fault in (*faults, *rounded_faults)]
    lab.solve_all(map(lab.case, [*layouts, *skips, *rounded, *planted]))
    kinds = ("layouts", "skips", "kept", "rounded", "rounded, broken", "faults", "rounded faults")
    rows: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for layout in layouts:
        rows["layouts"][layout.name] = lab.measure(lab.case(layout))
        _tell(layout.name, rows["layouts"][layout.name])
    for layout in skips:
        rows["skips"][layout.name] = measure_skips(lab, layout)
        _tell(f"skip: {layout.name}", rows["skips"][layout.name])
        if layout.name in KEPT:
            rows["kept"][layout.name] = measure_kept_gradients(lab, layout)
            _tell(f"kept: {layout.name}", rows["kept"][layout.name])
    for layout in rounded:
        rows["rounded"][layout.name] = lab.measure(lab.case(layout))
        _tell(layout.name, rows["rounded"][layout.name])
    with mock.patch.object(engine_step, "sum_sequence_parallel_gradients", lambda *_: None):
        for layout in rounded[:1]:
            rows["rounded, broken"][layout.name] = lab.measure(lab.case(layout))
    for fault in faults:
        rows["faults"][fault.name] = measure_broken(lab, fault)
        _tell(f"fault: {fault.name}", rows["faults"][fault.name])
    for fault in rounded_faults:
        rows["rounded faults"][fault.name] = measure_broken(lab, fault)
        _tell(f"fault in BF16: {fault.name}", rows["rounded faults"][fault.name])
    if dist.get_rank() == 0:
        write_result(rows)
    dist.barrier()
    dist.destroy_process_group()


def _tell(name: str, row: dict[str, Any]) -> None:
    """Progress: should a layout hang, the output ends with the one before."""
    if dist.get_rank() == 0:
        hidden = ("gradients", "updates", "ratios", "losses", "truth_norms")
        print(name, {k: v for k, v in row.items() if k not in hidden}, flush=True)


if __name__ == "__main__":
    main()
