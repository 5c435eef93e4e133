"""One rank of the parity launch: every layout, control and skipped step, into one JSON file."""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from tests.launch import write_result
from tests.parity.controls import measure_broken
from tests.parity.layouts import CONTROLS, LAYOUTS, SKIPS
from tests.parity.measure import Lab
from tests.parity.skips import measure_skips


def main() -> None:
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    torch.set_num_threads(1)
    apply_cpu_shim()
    dist.init_process_group("gloo")
    wanted = sys.argv[1:]
    layouts, skips, controls = (
        [entry for entry in entries if not wanted or any(part in entry.name for part in wanted)]
        for entries in (LAYOUTS, SKIPS, CONTROLS)
    )
    lab = Lab(Path(os.environ["LAUNCH_FOLDER"]) / f"rank{dist.get_rank()}")
    lab.solve_all([*layouts, *skips, *(control.layout for control in controls)])
    rows = {"layouts": {}, "skips": {}, "controls": {}}
    for layout in layouts:
        rows["layouts"][layout.name] = lab.measure(layout)
        _tell(layout.name, rows["layouts"][layout.name])
    for layout in skips:
        rows["skips"][layout.name] = measure_skips(lab, layout)
        _tell(f"skip: {layout.name}", rows["skips"][layout.name])
    for control in controls:
        rows["controls"][control.name] = measure_broken(lab, control)
        _tell(f"control: {control.name}", rows["controls"][control.name])
    if dist.get_rank() == 0:
        write_result(rows)
    dist.barrier()
    dist.destroy_process_group()


def _tell(name: str, row: dict) -> None:
    """Progress: should a layout hang, the output ends with the one before."""
    if dist.get_rank() == 0:
        shown = {
            key: value
            for key, value in row.items()
            if key not in ("gradients", "losses", "truth_norms")
        }
        print(name, shown, flush=True)


if __name__ == "__main__":
    main()
