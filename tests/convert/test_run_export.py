"""A run exports beside its last checkpoint; stock transformers answers from it as we do."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.convert.online import Exporter
from ghostvis_mega.eval.stock_answers import answer_both
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.errors import CheckpointError
from tests.convert.demo_answers import both
from tests.launch import ROOT


@pytest.fixture(scope="module")
def run(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the demo's model on two data-parallel ranks would be the same: one rank."""
    output = tmp_path_factory.mktemp("run")
    settings = {
        "data.train": easy_vqa / "train.gvd",
        "data.heldout": easy_vqa / "test.gvd",
        "data.num_workers": 0,
        "batch.global_size": 2,
        "train.steps": 3,
        "checkpoint.save_every": 1,
        "checkpoint.export_hf": "saves",
        "log.output": output,
        "log.preview_steps": "[]",
        "log.evaluate": "false",
        "optim.warmup_steps": 0,
    }
    subprocess.run(
        [
            sys.executable,
            "examples/pretrain_vlm.py",
            "--config",
            "examples/configs/vlm_tiny_easyvqa.yaml",
            *(f"{name}={value}" for name, value in settings.items()),
        ],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        timeout=250,
        check=True,
    )
    return output


def test_a_run_keeps_as_many_exports_as_checkpoints(run: Path):
    kept = [path.name for path in sorted((run / "checkpoints").glob("step-*"))]
    assert kept == ["step-00000002", "step-00000003"]
    assert [path.name for path in sorted((run / "hf").iterdir())] == kept


def test_what_cannot_be_exported_is_told_before_the_first_step(easy_vqa: Path):
    """transformers reads the tokenizer of a Qwen2 text model by rules of its own."""
    base = load_run_config(
        Path("examples/configs/vlm_tiny_easyvqa.yaml"), [f"data.train={easy_vqa / 'train.gvd'}"]
    )
    Exporter(base)
    text = {"vision": None, "connector": None}

    def run(**llm: Any) -> RunConfig:
        changed = base.model.llm.model_copy(update=llm)
        model = base.model.model_copy(update={**text, "llm": changed})
        return base.model_copy(update={"model": model})

    assert base.model.llm.vocab_size == 512
    Exporter(run(qkv_bias=False))
    with pytest.raises(CheckpointError, match="tokenizer of such a model as Qwen2Tokenizer"):
        Exporter(run(qkv_bias=True))
    with pytest.raises(CheckpointError, match="has 512 ids, the model only 256: it is another"):
        Exporter(run(qkv_bias=False, vocab_size=256))


def test_the_command_writes_the_same_files(run: Path, easy_vqa: Path, tmp_path: Path):
    out = tmp_path / "out"
    checkpoint, online = run / "checkpoints/step-00000003", run / "hf/step-00000003"
    arguments = [
        "export",
        str(checkpoint),
        "--out",
        str(out),
        "--data",
        str(easy_vqa / "train.gvd"),
    ]
    result = CliRunner().invoke(app, ["convert", *arguments])
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in out.iterdir())
    assert filecmp.cmpfiles(out, online, files, shallow=False) == (files, [], [])
    for arguments, code in (
        (["verify", str(out)], 0),
        (["verify", str(checkpoint), str(out)], 0),
        (["verify", str(checkpoint), str(run / "hf/step-00000002")], 1),
        (["verify", str(checkpoint), str(run / "hf/step-00000002"), "--part", "connector"], 1),
        (["verify", str(tmp_path)], 2),
        (["diff", str(out), str(run / "hf/step-00000002"), "--json"], 0),
        (["export", str(checkpoint), "--out", str(out)], 2),
    ):
        result = CliRunner().invoke(app, ["convert", *arguments])
        assert result.exit_code == code, result.output
    rows = json.loads(
        CliRunner().invoke(app, ["convert", "diff", str(out), str(checkpoint), "--json"]).stdout
    )
    assert rows == [
        {"name": "different tensors", "value": 0, "unit": "of 67", "bar": None, "ok": None}
    ]


def test_the_command_asks_both(run: Path, easy_vqa: Path):
    checkpoint, export = run / "checkpoints/step-00000003", run / "hf/step-00000003"
    asking = [
        "convert",
        "verify",
        "--answers",
        "8",
        "--data",
        str(easy_vqa / "train.gvd"),
        "--json",
    ]
    result = CliRunner().invoke(app, [*asking, str(checkpoint), str(export)])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["answers that transformers gives as well, token for token"]["value"] == 8
    assert rows["greatest difference of a log-probability"]["value"] < 1e-4
    # No more are asked for than there are pictures.
    few = [*asking[:2], "--answers", "1000", "--data", str(easy_vqa / "test.gvd"), "--json"]
    result = CliRunner().invoke(app, [*few, str(checkpoint), str(export)])
    assert result.exit_code == 0, result.output
    all_rows = {row["name"]: row for row in json.loads(result.stdout)}
    asked = all_rows["answers that transformers gives as well, token for token"]
    assert 0 < asked["value"] == asked["bar"] <= 12
    # Weights of another step do not pass for these.
    result = CliRunner().invoke(app, [*asking, str(checkpoint), str(run / "hf/step-00000002")])
    assert result.exit_code == 1
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["greatest difference of a log-probability"]["value"] > 1e-3


def test_code_that_is_not_ours_is_not_run(run: Path, easy_vqa: Path, tmp_path: Path):
    export = tmp_path / "export"
    shutil.copytree(run / "hf/step-00000003", export)
    with (export / "modeling_ghostvis.py").open("a") as file:
        file.write("raise SystemExit('run')\n")
    with pytest.raises(CheckpointError, match="is not the code that this version writes"):
        answer_both(run / "checkpoints/step-00000003", export, easy_vqa / "test.gvd", count=1)


def test_transformers_answers_as_we_do(run: Path, easy_vqa: Path, groups: Groups):
    checkpoint, export = run / "checkpoints/step-00000003", run / "hf/step-00000003"
    data = easy_vqa / "test.gvd"
    answers = both(checkpoint, export, data, groups, count=8, length=6)
    assert len(answers) == 8
    for answer in answers:
        assert answer.ours == answer.theirs and len(answer.ours) == 6
        assert answer.error < 1e-4
    # Weights of another step do not pass for these.
    others = both(run / "checkpoints/step-00000002", export, data, groups, count=2, length=1)
    assert min(answer.error for answer in others) > 1e-3
