"""`sbatch slurm/vlm_7b.sh` under a real Slurm: preempted, a node lost, run into its time limit.

One job of two nodes with a process each lives through all of it; its settings are those of a tiny
model on CPUs. Slurm holds a requeued job for two minutes. The test shortens that wait and changes
the number of steps before the last start; back into the queue and to its checkpoint the job finds
by itself.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.checkpoint.folder import CheckpointFolder
from tests.launch import ROOT
from tests.slurm.cluster import Cluster, missing

ENDLESS, SAVE_EVERY, MORE = 1_000_000, 20, 3
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, seq_length: 128, num_workers: 2}}
batch: {{global_size: 2}}
optim: {{schedule: constant}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: {steps}, device: cpu, timeout_s: 60}}
checkpoint: {{save_every: {save_every}}}
log: {{output: {folder}/run, every: 100}}
"""

pytestmark = [pytest.mark.world_size(2), pytest.mark.timeout(1200)]

if problem := missing():
    # A skip alone is easily overlooked.
    sys.stderr.write(f"\nSLURM IS NOT TESTED: {problem}\n")
    pytestmark.append(pytest.mark.skip(reason=f"SLURM IS NOT TESTED: {problem}"))


@dataclass
class Job:
    """A job and what it has written."""

    cluster: Cluster
    folder: Path
    number: str

    @property
    def text(self) -> str:
        path = self.folder / f"{self.number}.out"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def steps(self) -> list[int]:
        """Closed lines of metrics.jsonl."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]

    def newest(self) -> int:
        """Step of the newest complete checkpoint."""
        return CheckpointFolder(self.folder / "run" / "checkpoints").last_step()

    def train_beyond(self, step: int) -> None:
        self.cluster.wait(
            lambda: (self.steps() or [0])[-1] >= step, f"step {step}:\n{self.text}", timeout_s=300
        )

    def back_in_queue(self) -> None:
        """Until the job is pending and nothing of it runs."""
        self.cluster.wait(lambda: self.state == "PENDING", "the requeue", timeout_s=150)
        self.cluster.wait(lambda: not self.cluster.steps_of(self.number), "its old steps")
        # The last word of the old batch script would be taken for the new one's.
        time.sleep(2)

    def start_now(self) -> None:
        """Spare it the two minutes for which Slurm may hold a requeued job."""
        try:
            self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        except RuntimeError:
            if self.state == "PENDING":
                raise


@dataclass
class Story:
    """What was seen before each new start."""

    job: Job
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, event: str) -> None:
        self.job.back_in_queue()
        job = self.job
        self.seen[event] = {
            "last": job.steps()[-1],
            "newest": job.newest(),
            "restarts": int(job.cluster.job(job.number)["Restarts"]),
            "text": job.text,
        }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as started:
        yield started


def submit(cluster: Cluster, folder: Path, *arguments: str) -> Job:
    """`sbatch` in the repository, as people call it."""
    environment = {
        "GHOSTVIS_DEVICE": "cpu",
        "GHOSTVIS_PYTHON": sys.executable,
        "GHOSTVIS_CONFIG": str(folder / "run.yaml"),
        "GHOSTVIS_WAIT_S": "20",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    command = ["sbatch", "--parsable", f"--output={folder}/%j.out", *arguments]
    return Job(cluster, folder, cluster.run(*command, cwd=ROOT, **environment))


def write_run(folder: Path, data: Path, *, steps: int) -> None:
    text = RUN.format(data=data, folder=folder, steps=steps, save_every=SAVE_EVERY)
    (folder / "run.yaml").write_text(text)


@pytest.fixture(scope="module")
def story(cluster: Cluster, easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("job")
    write_run(folder, easy_vqa, steps=ENDLESS)
    job = submit(cluster, folder, *SMALL, "slurm/vlm_7b.sh")
    story = Story(job)

    job.train_beyond(MORE)
    cluster.run("scontrol", "requeue", job.number)
    story.note("preempted")

    job.start_now()
    job.train_beyond(story.seen["preempted"]["last"] + MORE)
    cluster.kill_node("n2")
    story.note("node lost")
    cluster.start_node("n2")
    cluster.wait_for_nodes()

    job.start_now()
    job.train_beyond(story.seen["node lost"]["last"] + MORE)
    # Less is left than the script's `--signal` names, so the warning is due.
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")
    story.note("time limit")

    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    write_run(folder, easy_vqa, steps=story.seen["time limit"]["last"] + MORE)
    job.start_now()
    cluster.wait(lambda: job.state in ("COMPLETED", "FAILED"), "the end", timeout_s=300)
    return story


def resumed_after(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"resumes after step (\d+) of", text)]


def test_the_job_ends_with_every_step_once(story: Story) -> None:
    assert story.job.state == "COMPLETED", story.job.text
    last = story.seen["time limit"]["last"] + MORE
    assert story.job.steps() == list(range(1, last + 1))
    assert story.job.newest() == last
    summary = json.loads((story.job.folder / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert [seen["restarts"] for seen in story.seen.values()] == [1, 2, 3]


@pytest.mark.parametrize("event", ["preempted", "time limit"])
def test_no_step_is_lost_where_the_ranks_were_asked(story: Story, event: str) -> None:
    seen = story.seen[event]
    assert seen["newest"] == seen["last"]
    ends = re.findall(r"the ranks ended with (\d+)( after \w+)?", seen["text"])
    assert ends[-1] == ("85", " after TERM" if event == "preempted" else " after USR1")
    # The next start goes on from there and from nowhere else.
    starts = resumed_after(story.job.text)
    assert starts[list(story.seen).index(event)] == seen["last"]
    # Slurm requeues what it preempts itself; at the time limit only the job can.
    assert ("back into the queue: asked" in seen["text"]) == (event == "time limit")


def test_a_lost_node_costs_no_more_than_the_steps_since_the_last_save(story: Story) -> None:
    seen = story.seen["node lost"]
    assert story.seen["preempted"]["newest"] <= seen["newest"] <= seen["last"]
    assert seen["last"] - seen["newest"] <= SAVE_EVERY
    assert resumed_after(story.job.text)[1] == seen["newest"]


def test_the_first_start_had_nothing_to_resume(story: Story) -> None:
    assert resumed_after(story.seen["preempted"]["text"]) == []
    assert len(resumed_after(story.job.text)) == 3


def test_a_wrong_setting_ends_the_job_before_anything_is_started(
    cluster: Cluster, story: Story, tmp_path: Path
) -> None:
    config = (story.job.folder / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(config.replace(str(story.job.folder), str(tmp_path)))
    job = submit(cluster, tmp_path, *SMALL, "slurm/vlm_7b.sh", "train.stepps=3")
    cluster.wait(lambda: job.state in ("COMPLETED", "FAILED"), "the end", timeout_s=60)
    assert job.state == "FAILED"
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert job.text.count("train.stepps") == 1 and "Did you mean train.steps?" in job.text
    # Neither the node check nor a rank; the other job's log shows that the words are these.
    assert "start 1 on" not in job.text and "Traceback" not in job.text
    assert "start 1 on" in story.job.text
    assert not (tmp_path / "run").exists()


def test_tools_run_on_a_node(cluster: Cluster, story: Story, easy_vqa: Path) -> None:
    one = ["--nodes=1", "--cpus-per-task=1"]
    data = str(easy_vqa / "train.gvd")
    jobs = [
        submit(cluster, story.job.folder, *one, "slurm/preprocess.sh", "verify", data),
        submit(cluster, story.job.folder, *one, "slurm/convert.sh", "export", "nothing-here",
               "--out", "never", "--data", data),
    ]  # fmt: skip
    for job in jobs:
        cluster.wait(lambda job=job: job.state in ("COMPLETED", "FAILED"), "tools", timeout_s=100)
    assert jobs[0].state == "COMPLETED", jobs[0].text
    assert jobs[1].state == "FAILED" and "nothing-here" in jobs[1].text
