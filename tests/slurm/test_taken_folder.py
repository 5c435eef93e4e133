"""A job that loses its folder to another launch, as where locks end at the node, ends for good."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from ghostvis_mega.checkpoint.lease import LEASE_FILE, Lease
from tests.launch import ROOT
from tests.slurm.test_scripts import JOB, fake

RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, seq_length: 128}}
batch: {{global_size: 2}}
optim: {{schedule: constant}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: 100000, device: cpu, timeout_s: 120}}
checkpoint: {{save_every: 5}}
log: {{output: {folder}/run}}
"""
SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1 exec "$@"
"""
SCONTROL = """\
#!/bin/bash
case $2 in hostnames) echo n1 ;; show) echo "NodeName=n1 NodeAddr=127.0.0.1 Port=7" ;;
*) echo "scontrol $*" ;; esac
"""


def test_the_launch_that_loses_its_folder_ends_its_job(easy_vqa: Path, tmp_path: Path) -> None:
    run, config, log = tmp_path / "run", tmp_path / "run.yaml", tmp_path / "log"
    config.write_text(RUN.format(data=easy_vqa, folder=tmp_path))
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (fake(tmp_path / "bin", name, "") / name).write_text(text)
    command = f"source slurm/common.sh; check_settings() {{ echo {run}; }}; train {config}"
    one = {"SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    environment = os.environ | JOB | one | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with log.open("w") as file:
        job = subprocess.Popen(
            ["bash", "-euc", command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        latest, deadline = run / "checkpoints" / "latest", time.monotonic() + 100
        while not latest.exists():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        # It has got on, so that any other end would start it again.
        Lease(run, launch="later").take()
        code = job.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    told = log.read_text()
    assert code == 3, told
    assert re.search(r"run now belongs to launch later on .*, Slurm job 7\. This one stops", told)
    assert "the ranks ended with 3, step-" in told
    assert "requeue" not in told and "Traceback" not in told
    assert json.loads((run / LEASE_FILE).read_text())["launch"] == "later"
