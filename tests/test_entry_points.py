"""`examples/pretrain_vlm.py` as people start it: three launchers, a resume, wrong settings.

Every step of these runs takes the whole small dataset, so packs and single rows hold the same
samples and have to give the same loss; pictures are augmented by epoch, so every step differs.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.plan import PlanParams, build_plan
from tests.launch import ROOT

SEQ_LENGTH = 128
SAMPLES = 24
SCRIPT = "examples/pretrain_vlm.py"
BIN = Path(sys.executable).parent

RUN = """\
model: {{preset: vlm_tiny}}
data:
  {{train: {data}/train.gvd, heldout: {data}/test.gvd, seq_length: {length}, augment: true,
    segment_align: 4}}
batch: {{global_size: {packs}}}
optim: {{schedule: constant, lr: {{llm: 1.0e-3, vision: 1.0e-3, projector: 1.0e-3}}}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: 2, device: cpu, timeout_s: 60, recompute: auto}}
log: {{output: {folder}/run, preview_steps: [0, 2], preview_samples: 8}}
"""

CPU_ONLY = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = pytest.mark.world_size(2)


@dataclass(frozen=True)
class Outcome:
    """What a finished run has left."""

    output: Path
    text: str

    def steps(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return [json.loads(x) for x in (self.output / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text())


@pytest.fixture(scope="module")
def run_file(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a run whose every step takes all samples, packed."""
    params = PlanParams(
        algorithm="balanced",
        seq_length=SEQ_LENGTH,
        tokens_per_image=16,
        seed=0,
        group_images=True,
        segment_align=4,
    )
    plan = build_plan(Dataset.open(easy_vqa / "train.gvd"), params)
    assert len(plan.samples) == SAMPLES > plan.num_packs
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "run.yaml"
    path.write_text(
        RUN.format(data=easy_vqa, folder=folder, length=SEQ_LENGTH, packs=plan.num_packs)
    )
    return path


def start(command: list[str], *, timeout_s: float) -> str:
    """Run a command to its end; its output. Nothing that it has started outlives it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | CPU_ONLY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        pytest.fail(f"{command} did not end within {timeout_s:g} s:\n{text[-4000:]}")
    assert process.returncode == 0, text[-4000:]
    return text


def train(run_file: Path, launcher: list[str], name: str, *overrides: str) -> Outcome:
    """Start the example; `name` is its output."""
    output = run_file.parent / name
    settings = [f"log.output={output}", *overrides]
    text = start([*launcher, SCRIPT, "--config", str(run_file), *settings], timeout_s=100)
    return Outcome(output, text)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def plain(run_file: Path) -> Outcome:
    """Two steps under plain `python`, then the accuracy."""
    return train(run_file, [sys.executable], "plain", "log.evaluate=true")


@pytest.fixture(scope="module")
def tensor(run_file: Path) -> Outcome:
    """Two tensor-parallel ranks under `torchrun`."""
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    return train(run_file, launcher, "tensor", "parallel.tensor=2", "data.num_workers=1")


@pytest.fixture(scope="module")
def context(run_file: Path) -> Outcome:
    """Two ranks that share out every pack, and every picture in it."""
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    return train(run_file, launcher, "context", "parallel.context=2")


@pytest.fixture(scope="module")
def pipeline(run_file: Path) -> Outcome:
    """Two pipeline stages under the `deepspeed` launcher, one sample a row."""
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("the deepspeed launcher shows its processes every GPU; this is a run on CPUs")
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()]
    rows = ["data.packing=false", "data.segment_align=null"]
    rows += [f"batch.global_size={SAMPLES}", "batch.micro_size=2"]
    return train(run_file, launcher, "pipeline", "parallel.pipeline=2", *rows)


@pytest.mark.parametrize("name", ["plain", "tensor", "context", "pipeline"])
def test_a_run_leaves_metrics_report_checkpoint_and_summary(
    name: str, request: pytest.FixtureRequest
) -> None:
    run: Outcome = request.getfixturevalue(name)
    rows = run.steps()
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert all(row["samples"] == SAMPLES and row["images"] > 8 for row in rows)
    assert all(not row["skipped"] and row["flops_vision"] > 0 for row in rows)
    assert all(sum(row["timing"].values()) <= row["seconds"] for row in rows)
    summary = run.summary()
    assert summary["status"] == "finished"
    assert summary["loss"] == rows[-1]["loss"]
    page = (run.output / "report" / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img[^>]* src="data:image/png;base64,', page)) >= 8
    assert 'src="http' not in page
    assert (run.output / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert "Traceback" not in run.text


def test_launchers_and_layouts_agree(
    plain: Outcome, tensor: Outcome, context: Outcome, pipeline: Outcome
) -> None:
    one = plain.steps()
    for other in (tensor.steps(), context.steps(), pipeline.steps()):
        for mine, theirs in zip(one, other, strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
            for key in ("tokens", "trained_tokens", "images"):
                assert theirs[key] == mine[key]
        assert other[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
    # What the bar would notice: one step more or less.
    assert abs(one[0]["loss"] - one[1]["loss"]) > 0.1


def test_the_accuracy_is_in_the_summary(plain: Outcome, tensor: Outcome) -> None:
    summary = plain.summary()
    assert summary["num_questions"] == 12
    assert 0 <= summary["heldout_accuracy"] < 0.9
    assert 0 < summary["question_only_accuracy"] < 1
    assert summary["seconds"] > 0
    assert "heldout_accuracy" not in tensor.summary()


@pytest.fixture(scope="module")
def resumed(run_file: Path, plain: Outcome) -> Outcome:
    """The run under plain `python`, continued to four steps by the same command."""
    assert len(plain.steps()) == 2
    return train(run_file, [sys.executable], "plain", "train.steps=4")


@pytest.fixture(scope="module")
def uninterrupted(run_file: Path) -> Outcome:
    """The same four steps in one go, without previews: looking at the model changes nothing."""
    overrides = ["train.steps=4", "log.preview_steps=[]"]
    return train(run_file, [sys.executable], "one-go", *overrides)


def weights(run: Outcome) -> dict[str, bytes]:
    """Files of model and optimizer in the last checkpoint."""
    folder = run.output / "checkpoints" / "step-00000004"
    names = ("llm", "vision", "optimizer")
    return {name: (folder / f"{name}-00000.safetensors").read_bytes() for name in names}


def test_a_resumed_run_is_the_same_run(resumed: Outcome, uninterrupted: Outcome) -> None:
    assert [row["step"] for row in resumed.steps()] == [1, 2, 3, 4]
    assert resumed.losses() == uninterrupted.losses()
    assert len(set(uninterrupted.losses())) == 4
    norms, others = ([row["grad_norm"] for row in r.steps()] for r in (resumed, uninterrupted))
    assert norms == others
    assert weights(resumed) == weights(uninterrupted)
    assert "step 3/4" in resumed.text and "step 2/4" not in resumed.text


def test_a_finished_run_can_be_started_again(run_file: Path, resumed: Outcome) -> None:
    before = resumed.losses()
    again = train(run_file, [sys.executable], "plain", "train.steps=4")
    assert "nothing left to train: 4 of 4 steps are done" in again.text
    assert again.losses() == before
    assert again.summary()["status"] == "finished"


WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; sys.modules['deepspeed'] = None; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def refuse(
    run_file: Path, *overrides: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Start the example where torch cannot be imported."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, SCRIPT, "--config", str(run_file), *overrides],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.monotonic() - began


def test_wrong_settings_are_one_report_before_torch_is_imported(run_file: Path) -> None:
    wrong = {
        "train.stepps=3": "Did you mean train.steps?",
        "parallel.tensor=4": "model.llm.num_kv_heads=2",
        "model.vision.image_size=6": "model.vision.image_size=6",
        "data.train=nowhere.gvd": "data.train: nowhere.gvd",
        "data.heldout=nothing.gvd": "data.heldout: nothing.gvd",
        "checkpoint.resume=lost": "checkpoint.resume=lost",
    }
    done, seconds = refuse(run_file, *wrong, WORLD_SIZE="4", RANK="0")
    assert done.returncode == 2, done.stderr
    assert seconds < 5
    for text in wrong.values():
        assert text in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_only_the_first_rank_of_a_node_reports(run_file: Path) -> None:
    done, _ = refuse(run_file, "train.steps=0", WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_right_settings_do_reach_torch(run_file: Path) -> None:
    done, _ = refuse(run_file)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr and "torch" in done.stderr
