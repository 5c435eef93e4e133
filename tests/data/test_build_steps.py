"""Recipes that also dedupe, describe and export: once, and again when their input changes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ghostvis_mega.data import build_steps
from ghostvis_mega.data.build import Built, build
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.recipe import load_recipe
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

SIZES = {"seq_length": 96, "tokens_per_image": 4}
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
    assert reasons == {"leaked_image", "missing_image", "duplicate"}
    # Four questions are about the leaked picture. Of the other rows seven repeat one; questions
    # that differ are no duplicates though their picture is the same.
    assert built.manifest.counts.samples == 21 - 1 - 4 - 7


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stats": [{**SIZES, "report": "rows.json"}]}, "would replace .*rows.json"),
        ({"stats": [{**SIZES, "html": "recipe.yaml"}]}, "would replace .*recipe.yaml"),
        ({"exports": [{"format": "webdataset", "out": "photos"}]}, "would replace .*photos"),
        ({"exports": [{"format": "webdataset", "out": "link"}]}, "would replace .*photos"),
        ({"out": "../inputs"}, "would replace .*recipe.yaml"),
        ({"dedupe": {"against": "eval.gvd"}, "out": "eval.gvd"}, "would replace .*eval.gvd"),
        (
            {
                "dedupe": {"against": "eval.gvd"},
                "stats": [{**SIZES, "report": "eval.gvd/manifest.json"}],
            },
            "lies inside .*eval.gvd",
        ),
        ({"stats": [{**SIZES, "html": "made.gvd/page.html"}]}, "lies inside the output .*made.gvd"),
        (
            {
                "sources": [{"format": "megatron", "path": "text"}],
                "exports": [{"format": "megatron", "out": "text"}],
            },
            "would replace .*text.bin",
        ),
    ],
)
def test_no_output_replaces_an_input(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    folder = tmp_path / "inputs"
    _write_inputs(folder)
    (folder / "link").symlink_to(folder / "photos")
    recipe = _recipe(folder, **change)
    with pytest.raises(DataError, match=expected):
        load_recipe(recipe)


def test_outputs_may_lie_beside_inputs(folder: Path) -> None:
    """A folder that is read may hold what is written: only equal or enclosing names collide."""
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("some text")
    _recipe(
        folder,
        out="notes/made.gvd",
        sources=[{"format": "text", "path": "notes"}],
        stats=[],
        exports=[{"format": "megatron", "out": "notes/all"}],
    )
    assert _build(folder).steps == ("export all",)
    assert _build(folder).up_to_date


@pytest.mark.parametrize("name", ["page.html", "numbers.json"])
def test_pages_that_no_build_made_are_not_replaced(folder: Path, name: str) -> None:
    (folder / name).write_text("thesis")
    with pytest.raises(DataError, match=f"{name} exists already and no build made it"):
        _build(folder)
    assert (folder / name).read_text() == "thesis"
    _build(folder, force=True)
    assert (folder / name).read_text() != "thesis"


def test_a_page_of_a_killed_build_is_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the last byte of an output and the note that it is done."""
    for step in ("_stats", "_export"):
        made = getattr(build_steps, step)

        def stop(*arguments: object, made: Callable[..., None] = made) -> None:
            made(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(build_steps, step, stop)
            _build(folder)
    assert _build(folder).steps == ("export shards", "export energon", "export text")


def test_a_page_in_a_new_folder_is_made(folder: Path) -> None:
    _recipe(folder, stats=[{**SIZES, "html": "new/page.html"}], exports=[])
    _build(folder)
    assert (folder / "new" / "page.html").is_file()
    _recipe(folder, stats=[{**SIZES, "html": "rows.json/page.html"}], exports=[])
    with pytest.raises(DataError, match=r"rows\.json"):
        _build(folder)
    (folder / "taken").mkdir()
    _recipe(folder, stats=[{**SIZES, "html": "taken"}], exports=[])
    with pytest.raises(DataError, match="is a directory"):
        _build(folder, force=True)


def test_a_dry_run_checks_targets_and_names_steps(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry(*options: str) -> tuple[int | str | None, str, str]:
        try:
            code: int | str | None = main(["build", str(recipe), "--dry-run", *options])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    built = _build(folder)
    model = folder / "tok.model"
    model.write_bytes((folder / "made.gvd" / "tokenizer.model").read_bytes())
    recipe = _recipe(folder, tokenizer={"file": "tok.model"})
    code, text, _ = dry()
    assert (code, "20 samples" in text, "before dedupe" in text) == (0, True, True)
    steps = ", ".join(built.steps)
    assert f"would make: made.gvd, plan balanced, plan concat, {steps}" in text
    _build(folder)
    assert "nothing, all is up to date" in dry()[1]
    assert json.loads(dry("--json")[1])["would_make"] == []
    recipe = _recipe(folder, tokenizer={"file": "tok.model"}, out="taken.gvd")
    (folder / "taken.gvd").mkdir()
    code, _, problem = dry()
    assert (code, "taken.gvd exists already" in problem) == (2, True)
