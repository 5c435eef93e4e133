"""Values of secrets are in nothing that the system writes."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ghostvis_mega.config.load import read_run_config
from ghostvis_mega.utils.logging import setup_logging
from ghostvis_mega.utils.secrets import Secret, find_secrets, hide
from tests.launch import ROOT

pytestmark = pytest.mark.durability

FAKE = {
    "HF_TOKEN": "hf_FakeFakeFakeFake0001",
    "WANDB_API_KEY": "fake0002fake0002fake0002",
    "AWS_SECRET_ACCESS_KEY": "Fake/0003+Fake/0003",
    "MY_DB_PASSWORD": "fake 0004 fake",
    "SLURM_JWT": "fake0005.fake0005.fake0005",
}
RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, heldout: {data}/test.gvd, seq_length: 128}}
batch: {{global_size: 2}}
deepspeed: {{llm: {root}/ds_configs/zero1.json}}
train: {{steps: 1, device: cpu, timeout_s: 60}}
log: {{output: {folder}/run, tensorboard: true, preview_steps: [1], preview_samples: 1}}
"""
TALKATIVE = """\
import logging, os, runpy, sys
from ghostvis_mega import session
honest = session.Training.execute
def execute(self):
    log = logging.getLogger("ghostvis_mega.session")
    for name in os.environ["NAMES"].split():
        log.warning("the environment has %s=%s", name, os.environ[name])
    try:
        raise OSError(os.environ["HF_TOKEN"])
    except OSError:
        log.exception("a traceback")
    return honest(self)
session.Training.execute = execute
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def holders(folder: Path) -> list[str]:
    """Files that hold a fake token."""
    values = [value.encode() for value in FAKE.values()]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.name for path in files if any(v in path.read_bytes() for v in values)]


@pytest.fixture
def run_file(easy_vqa: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(data=easy_vqa, root=ROOT, folder=tmp_path))
    return path


def test_no_token_in_anything_a_run_leaves(run_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TALKATIVE, "examples/pretrain_vlm.py", "--config", str(run_file)],
        cwd=ROOT,
        env=os.environ | FAKE | {"NAMES": " ".join(FAKE)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    folder = run_file.parent
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    assert done.stderr.count("***") >= len(FAKE) + 1
    assert "a traceback" in done.stderr and "OSError: ***" in done.stderr
    names = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".safetensors", ".json", ".jsonl", ".html", ".txt"} <= names
    assert any("tfevents" in path.name for path in folder.rglob("*"))
    assert holders(folder) == []
    # The same look finds a token that is there.
    (folder / "run" / "planted.json").write_text(json.dumps({"token": FAKE["HF_TOKEN"]}))
    assert holders(folder) == ["planted.json"]


def test_a_setting_that_holds_a_secret_is_refused(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"log.output=runs/{FAKE['HF_TOKEN']}"]
    assert read_run_config(run_file, overrides).problems == []
    for name, value in FAKE.items():
        monkeypatch.setenv(name, value)
    assert read_run_config(run_file).problems == []
    (problem,) = read_run_config(run_file, overrides).problems
    assert problem.startswith("log.output holds the value of $HF_TOKEN, which is a secret.")
    assert FAKE["HF_TOKEN"] not in problem


def test_commands_do_not_repeat_a_secret(run_file: Path) -> None:
    for options in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "ghostvis_mega", "check", str(run_file),
             f"{FAKE['WANDB_API_KEY']}", f"log.output={FAKE['HF_TOKEN']}", *options],
            env=os.environ | FAKE,
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        text = done.stdout + done.stderr
        assert "override '***'" in text and "$HF_TOKEN" in text
        assert not any(value in text for value in FAKE.values())


def test_which_variables_are_secret() -> None:
    others = {"TOKENIZERS_PARALLELISM": "false-false", "PATH": "/usr/bin:/bin", "KEYBOARD": "x" * 9,
              "HF_HOME": "/home/hf_home", "SHORT_TOKEN": "abc", "MONKEY": "12345678"}  # fmt: skip
    assert {secret.name for secret in find_secrets(FAKE | others)} == set(FAKE)
    secret = Secret("HF_TOKEN", FAKE["HF_TOKEN"])
    assert FAKE["HF_TOKEN"] not in f"{secret} {secret!r} {[secret]}"


def test_one_secret_inside_of_another_is_hidden_whole() -> None:
    secrets = find_secrets({"A_TOKEN": "12345678", "B_TOKEN": "1234567890"})
    assert hide("1234567890 and 12345678", secrets) == "*** and ***"


def test_the_log_hides_what_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    root, ours = logging.getLogger(), logging.getLogger("ghostvis_mega")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    texts = []
    try:
        for known in (False, True):
            if known:
                monkeypatch.setenv("HF_TOKEN", FAKE["HF_TOKEN"])
            stream = io.StringIO()
            setup_logging(rank=0, stream=stream)
            logging.getLogger("ghostvis_mega.x").info("the token is %s", FAKE["HF_TOKEN"])
            texts.append(re.sub(r"^\S+ \[0\] ", "", stream.getvalue()))
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        logging.captureWarnings(False)
    # What is no secret of the environment is text like any other.
    assert texts == [f"the token is {FAKE['HF_TOKEN']}\n", "the token is ***\n"]


@pytest.mark.parametrize("thread", [False, True])
def test_a_traceback_that_nobody_caught_hides_them(thread: bool) -> None:
    lines = [
        "import os, threading",
        "from ghostvis_mega.utils.logging import setup_logging",
        "setup_logging(rank=0)",
        "def fail():",
        "    raise ValueError(f'no access with {os.environ[\"HF_TOKEN\"]}')",
        "threading.Thread(target=fail).start()" if thread else "fail()",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | FAKE | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "ValueError: no access with ***" in done.stderr
    assert "in fail" in done.stderr and FAKE["HF_TOKEN"] not in done.stderr
    assert ("Exception in thread" in done.stderr) == thread
