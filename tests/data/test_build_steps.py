"""Recipes that also dedupe, describe and export: once, and again when their input changes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ghostvis_mega.data.build import Built, build
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.recipe import load_recipe
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

OUTPUTS = ("made.gvd", "page.html", "numbers.json", "shards", "energon", "text.bin", "text.json")


def _write_inputs(folder: Path) -> None:
    """Ten questions about five pictures, each asked twice, one without its picture; a greeting."""
    (folder / "photos").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (24, 18), (50 * number, 0, 99)).save(folder / "photos" / f"{number}.png")
    rows = []
    for number in range(20):
        turns = [
            {"from": "human", "value": f"<image>what is number {number % 10}?"},
            {"from": "gpt", "value": "a picture."},
        ]
        rows.append({"conversations": turns, "image": f"{number % 5}.png"})
    rows[7]["image"] = "missing.png"
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello."}]
    rows.insert(0, {"conversations": talk})
    (folder / "rows.json").write_text(json.dumps(rows))


def _recipe(folder: Path, **changes: object) -> Path:
    sizes = {"seq_length": 96, "tokens_per_image": 4}
    document = {
        "out": "made.gvd",
        "tokenizer": {"vocab": 300},
        "sources": [{"format": "llava", "path": "rows.json", "images": "photos"}],
        "dedupe": {"images": "exact", "text": "exact"},
        "plans": [sizes, {**sizes, "algorithm": "concat"}],
        "stats": [{**sizes, "dp": [2], "html": "page.html", "report": "numbers.json"}],
        "exports": [
            {"format": "webdataset", "out": "shards"},
            {"format": "energon", "out": "energon"},
            {"format": "megatron", "out": "text", "skip_images": True},
        ],
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return folder / "recipe.yaml"


def _tree(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in OUTPUTS:
        path = folder / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        found |= {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}
    return found


def _build(folder: Path, **options: object) -> Built:
    return build(load_recipe(folder / "recipe.yaml"), **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _write_inputs(tmp_path)
    _recipe(tmp_path)
    return tmp_path


def test_all_steps_run_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = _build(folder)
    assert built.steps == (*("stats page.html", "export shards", "export energon", "export text"),)
    assert verify_dataset(folder / "made.gvd", deep=True) == []
    # Ten of the rows repeat others; the one without a picture is no repetition.
    with Dataset.open(folder / "made.gvd") as made:
        assert made.num_samples == 11
    lines = (folder / "made.gvd" / "rejects.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert sorted(reasons) == ["duplicate"] * 9 + ["missing_image"]
    assert built.manifest.counts.rejected == 10 and built.manifest.sources[0].rows == 21
    assert len(built.plans) == 2
    assert json.loads((folder / "numbers.json").read_bytes())["path"] == "made.gvd"
    assert (folder / "energon" / ".nv-meta").is_dir()
    before = time.process_time()
    assert _build(folder).up_to_date
    assert time.process_time() - before < 1
    with pytest.raises(SystemExit, match="0"):
        main(["build", str(folder / "recipe.yaml"), "--json"])
    assert json.loads(capsys.readouterr().out)["steps"] == []


def test_outputs_depend_on_the_inputs_alone(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    _write_inputs(other)
    _recipe(other)
    _build(folder)
    _build(other, workers=2)
    assert _tree(folder) == _tree(other)
    assert len(_tree(folder)) > 15


def test_only_what_changed_is_made_again(folder: Path) -> None:
    first = _build(folder)
    (folder / "page.html").write_text("edited")
    shutil.rmtree(folder / "shards")
    again = _build(folder)
    assert not again.up_to_date and again.manifest.digest == first.manifest.digest
    assert again.steps == ("stats page.html", "export shards")
    # Another setting of one export; then other rows, and all follows.
    exports = [{"format": "webdataset", "out": "shards", "shard_mib": 1}]
    _recipe(folder, exports=exports)
    assert _build(folder).steps == ("export shards",)
    rows = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps(rows[:12]))
    last = _build(folder)
    assert last.steps == ("stats page.html", "export shards")
    assert last.manifest.digest != first.manifest.digest


def test_a_stop_in_any_step_is_made_good(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build(folder)
    whole = _tree(folder)
    names = ("_dedupe", "write_parts", "save_plan", "publish", "_run_steps")
    targets = [f"ghostvis_mega.data.build.{name}" for name in names]
    targets += [f"ghostvis_mega.data.build_steps.{name}" for name in ("_stats", "_export")]
    for number, target in enumerate(targets):
        other = tmp_path / f"stopped{number}"
        _write_inputs(other)
        _recipe(other)

        def stop(*arguments: object, **options: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, stop)
            _build(other)
        assert not _build(other).up_to_date
        assert _tree(other) == whole
        assert not list(other.glob("*.tmp-*"))


def test_halves_of_killed_steps_are_removed(folder: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = ("page.html", "shards", "text.bin")
    halves = [folder / f"{name}.tmp-{ended.pid}-0123abcd" for name in names]
    alive = folder / f"page.html.tmp-{os.getpid()}-0123abcd"
    for half in (*halves, alive):
        half.mkdir() if half.name.startswith("shards") else half.write_text("half")
    _build(folder)
    assert not any(half.exists() for half in halves) and alive.exists()


def test_exports_that_no_build_made_are_not_replaced(folder: Path) -> None:
    (folder / "shards").mkdir()
    with pytest.raises(DataError, match="shards exists already"):
        _build(folder)
    assert (folder / "page.html").is_file()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dedupe": {"images": "ignore", "text": "ignore"}}, "nothing is left to compare"),
        ({"stats": [{"seq_length": 9, "tokens_per_image": 1}]}, "give `html`, `report`"),
        ({"plans": [{"seq_length": 9, "tokens_per_image": 1, "segment_align": 4}]}, "not a multi"),
        ({"exports": [{"format": "parquet", "out": "x"}]}, r"exports\.0\.format"),
        ({"exports": [{"format": "energon", "out": "made.gvd"}]}, "two outputs have the name"),
    ],
)
def test_wrong_steps_are_named(folder: Path, change: dict[str, object], expected: str) -> None:
    _recipe(folder, **change)
    with pytest.raises(DataError, match=expected):
        _build(folder)


def test_an_evaluation_set_is_kept_out(folder: Path) -> None:
    eval_folder = folder / "eval"
    _write_inputs(eval_folder)
    rows = json.loads((eval_folder / "rows.json").read_text())
    (eval_folder / "rows.json").write_text(json.dumps([rows[1]]))  # about picture 0
    _build(folder)
    tokenizer = {"file": str(folder / "made.gvd" / "tokenizer.model")}
    _recipe(eval_folder, tokenizer=tokenizer, dedupe=None, exports=[], stats=[])
    _build(eval_folder)
    against = {"against": "eval/made.gvd", "images": "exact", "text": "ignore"}
    _recipe(folder, out="clean.gvd", tokenizer=tokenizer, dedupe=against, exports=[], stats=[])
    built = _build(folder)
    lines = (folder / "clean.gvd" / "rejects.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["reason"] for line in lines}
    assert reasons == {"leaked_image", "missing_image"}
    assert built.manifest.counts.samples == 16
