"""`ingest` and `build` as people type them."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.readers.registry import FORMATS
from ghostvis_mega.data.tokenizer import Tokenizer
from tools.preprocess.cli import main


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def charts(tmp_path: Path) -> Path:
    """ChartQA with one picture that is missing."""
    (tmp_path / "png").mkdir()
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "png" / "a.png")
    rows = [{"imgname": f"{name}.png", "query": "How many?", "label": "3"} for name in "aab"]
    (tmp_path / "train_human.json").write_text(json.dumps(rows))
    return tmp_path / "train_human.json"


def test_dry_run_counts_and_writes_nothing(
    charts: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(charts.parent.rglob("*"))
    command = ["ingest", "chartqa", charts, "--images", charts.parent / "png"]
    command += ["--tokenizer", tokenizer.path, "--dry-run"]
    code, text, _ = _run(capsys, *command)
    assert code == 0
    assert "3 rows would give 2 samples, 1 images" in text
    assert "rejected: missing_image 1" in text
    code, text, _ = _run(capsys, *command, "--json")
    assert json.loads(text)["rejected"] == {"missing_image": 1}
    assert sorted(charts.parent.rglob("*")) == before
    code, _, problem = _run(capsys, *command[:-1])
    assert (code, problem.strip().startswith("error: --out is needed")) == (2, True)


def test_template_and_workers(
    charts: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = charts.parent / "made.gvd"
    command = ["ingest", "chartqa", charts, "--images", charts.parent / "png", "--workers", "2"]
    command += ["--tokenizer", tokenizer.path, "--template", "vicuna", "--out", out, "--json"]
    code, text, _ = _run(capsys, *command)
    assert (code, json.loads(text)["samples"]) == (0, 2)
    with Dataset.open(out) as dataset:
        assert dataset.manifest.template.name == "vicuna"
        prompt, _, answer, question = dataset.prompt(0)
        assert (question, answer) == ("How many?", "3")
        assert dataset.tokenizer.decode(prompt) == "USER: How many? ASSISTANT: "


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ingest", "tsv"], "no input format 'tsv': use one of easy-vqa, llava"),
        (["ingest", "text", "--template", "alpaca"], "no chat template 'alpaca'"),
        (["ingest", "vqav2", "q.json"], "--annotations"),
    ],
)
def test_wrong_names_are_one_sentence(
    arguments: list[str], expected: str, tokenizer: Tokenizer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--tokenizer", tokenizer.path, "--out", tmp_path / "a.gvd"]
    if arguments[1] == "text":
        (tmp_path / "a.txt").write_text("text")
        options.append(tmp_path / "a.txt")
    code, _, problem = _run(capsys, *arguments, *options)
    assert code == 2
    assert expected in problem
    assert problem.startswith("error: ")
    assert not (tmp_path / "a.gvd").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["chat", "a.jsonl", "--images", "x"], "--images"),
        (["text", "a.txt", "--prompt", "What?"], "--prompt"),
        (["llava", "a.json", "--split", "test"], "--split"),
        (["textvqa", "a.json", "--images", "x", "--annotations", "b"], "--annotations"),
        (["easy-vqa", "a.json"], "the input path"),
    ],
)
def test_options_without_a_use_are_refused(
    arguments: list[str], named: str, tokenizer: Tokenizer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    common = ["--tokenizer", tokenizer.path, "--out", tmp_path / "a.gvd"]
    code, _, problem = _run(capsys, "ingest", *arguments, *common)
    assert (code, problem.count("\n")) == (2, 1)
    assert f"the format {arguments[0]} has no use for" in problem and named in problem
    code, _, problem = _run(capsys, "train-tokenizer", "--from", *arguments, "--out", common[3])
    assert code == 2 and named in problem


def test_tokenizers_and_demo_inputs_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some words that are text")
    (tmp_path / "tokenizer.model").write_text("mine")
    train = ["train-tokenizer", "--from", "text", tmp_path / "a.txt", "--vocab", "300", "--out"]
    for command in ([*train, tmp_path / "tokenizer.model"], ["demo-blend", "--out", tmp_path]):
        code, _, problem = _run(capsys, *command)
        assert code == 2 and "tokenizer.model exists already" in problem
    assert (tmp_path / "tokenizer.model").read_text() == "mine"
    assert _run(capsys, *train, tmp_path / "tokenizer.model", "--force")[0] == 0
    assert (tmp_path / "tokenizer.model").read_bytes() != b"mine"


def test_help_lists_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _run(capsys, "ingest", "--help")
    assert code == 0
    assert all(f"{name}:" in text for name in FORMATS)


def test_build_says_when_there_is_nothing_to_do(
    charts: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = charts.parent / "recipe.yaml"
    source = {"format": "chartqa", "path": charts.name, "images": "png", "license": "GPL-3.0"}
    text = {"out": "made.gvd", "tokenizer": {"file": str(tokenizer.path)}, "sources": [source]}
    recipe.write_text(yaml.safe_dump(text))
    code, printed, _ = _run(capsys, "build", recipe, "--dry-run")
    assert (code, "would give 2 samples" in printed) == (0, True)
    assert not (charts.parent / "made.gvd").exists()
    code, printed, _ = _run(capsys, "build", recipe)
    assert (code, ": built: 2 samples, 1 images" in printed) == (0, True)
    code, printed, _ = _run(capsys, "build", recipe, "--json")
    assert (code, json.loads(printed)["up_to_date"]) == (0, True)
    charts.write_text(charts.read_text() + " ")
    code, printed, _ = _run(capsys, "build", recipe)
    assert (code, ": built: " in printed) == (0, True)
    text["sources"] = [{**source, "tokenizer": "other.model"}]
    recipe.write_text(yaml.safe_dump(text))
    code, _, problem = _run(capsys, "build", recipe)
    assert (code, "`sources.0.tokenizer`: remove it" in problem) == (2, True)
