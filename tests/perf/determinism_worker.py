"""Two ranks train the same steps again and again, with the switch on; once they are disturbed."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import build_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.determinism import run_bits
from ghostvis_mega.perf.stress_data import write_datasets
from ghostvis_mega.perf.stress_layouts import (
    StressJob,
    choose_layouts,
    settings_of,
    write_deepspeed_files,
)
from ghostvis_mega.utils.determinism import determinism, make_deterministic
from tests.launch import write_result

STEPS = 4


def unreproducible() -> str:
    """What is said about an operation that has no reproducible kernel."""
    try:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    except RuntimeError as error:
        return str(error)
    return "allowed"


def main() -> None:
    before = unreproducible()
    make_deterministic()
    apply_cpu_shim()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (layout,) = choose_layouts("pp2", processes=2)
    job = StressJob(
        folder=Path(os.environ["LAUNCH_FOLDER"]),
        layouts=(layout,),
        steps=STEPS,
        seed=0,
        step_timeout_s=100,
    )
    if rank == 0:
        write_datasets(job.folder / "data")
        write_deepspeed_files(job)
    dist.barrier()
    run = settings_of(layout, job, steps=STEPS, cuda=False)
    groups = build_groups(Degrees.of(run, world_size=2), seed=0)
    first, second, noisy = (
        run_bits(
            run,
            groups,
            device=torch.device("cpu"),
            steps=STEPS,
            progress=lambda _: None,
            noise=noise,
        )
        for noise in (False, False, True)
    )
    if rank == 0:
        write_result(
            {
                "first": first,
                "second": second,
                "noisy": noisy,
                "unreproducible": [before, unreproducible()],
                "settings": determinism(),
            }
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
