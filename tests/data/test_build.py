"""A build that is killed and run again is the build that was never killed, byte for byte."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ghostvis_mega.data.build import build
from ghostvis_mega.data.ingest import Row, Source, dry_run, ingest
from ghostvis_mega.data.leftovers import clear_leftovers, hold
from ghostvis_mega.data.readers.registry import SourceSpec, open_source
from ghostvis_mega.data.recipe import load_recipe
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.progress import Progress

ROWS, BLOCKS = 640, 10
WORKER = Path(__file__).with_name("build_worker.py")


def _tree(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about 60 pictures, two of them bad, and documents; a recipe without `out`."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "photos").mkdir()
    for number in range(60):
        picture = Image.effect_noise((40, 30), 50 + number)
        picture.save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "7.png").write_bytes(b"<html>")
    rows = []
    for number in range(ROWS - 64):
        picture = {"image": f"{number * 7 % 61}.png"} if number % 3 else {}  # 60.png is missing
        question = f"{'<image>' if picture else ''}\nwhat is number {number}?"
        answer = "a picture." if number % 50 else " "
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns, **picture})
    (folder / "rows.json").write_text(json.dumps(rows))
    lines = [json.dumps({"text": f"document {number} " * 9}) for number in range(64)]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


def _recipe(inputs: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    text = {
        "out": "made.gvd",
        "tokenizer": {"vocab": 400},
        "max_tokens": 24,
        "sources": [
            {
                "format": "llava",
                "path": str(inputs / "rows.json"),
                "images": str(inputs / "photos"),
            },
            {"format": "text", "path": str(inputs / "documents.jsonl"), "license": "CC0"},
        ],
        "plans": [{"seq_length": 128, "tokens_per_image": 4}],
    }
    path.write_text(yaml.safe_dump(text))
    return path


def _start(recipe: Path, workers: int) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(recipe), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )


def _run_killed(recipe: Path, workers: int, *, lines: int, delay: float) -> bool:
    """Kill a build some time after its `lines`-th line; False if it was done before."""
    with _start(recipe, workers) as process:
        assert process.stdout is not None
        for _ in range(lines):
            if process.stdout.readline().strip() in ("done", ""):
                break
        time.sleep(delay)
        running = process.poll() is None
        process.kill()
    return running


def _run(recipe: Path, workers: int) -> list[str]:
    with _start(recipe, workers) as process:
        assert process.stdout is not None
        lines = process.stdout.read().split("\n")
    assert process.returncode == 0
    return lines


@pytest.fixture(scope="module")
def unharmed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tree of a build by one process that nobody killed."""
    recipe = _recipe(inputs, tmp_path_factory.mktemp("unharmed"))
    lines = _run(recipe, 1)
    assert lines[BLOCKS - 1 : BLOCKS + 1] == [f"{ROWS} {lines[BLOCKS - 1].split()[1]}", "done"]
    out = recipe.parent / "made.gvd"
    assert verify_dataset(out, deep=True) == []
    assert len(list(out.glob("media/*.tar"))) > 1
    assert len(list(out.glob("plans/*/plan.json"))) == 1
    ledger = [
        json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines()
    ]
    assert set(ledger) == {"not_an_image", "missing_image", "empty_answer"}
    return _tree(out)


def _kill_and_compare(
    inputs: Path, folder: Path, unharmed: dict[str, bytes], *, workers: int, kills: int, seed: int
) -> None:
    recipe, moments = _recipe(inputs, folder), random.Random(seed)
    killed = 0
    for _ in range(kills):
        lines, delay = moments.randrange(1, BLOCKS + 2), moments.random() * 0.02
        killed += _run_killed(recipe, workers, lines=lines, delay=delay)
        out = folder / "made.gvd"
        assert not out.exists() or _tree(out) == unharmed
    assert killed
    _run(recipe, workers)
    assert _tree(folder / "made.gvd") == unharmed
    names = {path.name for path in folder.iterdir()}
    assert names == {"made.gvd", ".made.gvd.build.json", "recipe.yaml"}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_builds_give_the_same_bytes(
    inputs: Path, unharmed: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    _kill_and_compare(inputs, tmp_path, unharmed, workers=workers, kills=2, seed=workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_builds_killed_ten_times_give_the_same_bytes(
    inputs: Path, unharmed: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    _kill_and_compare(inputs, tmp_path, unharmed, workers=workers, kills=10, seed=9 + workers)


def test_a_killed_build_goes_on_where_it_was(
    inputs: Path, unharmed: dict[str, bytes], tmp_path: Path
) -> None:
    recipe = _recipe(inputs, tmp_path)
    assert _run_killed(recipe, 1, lines=6, delay=0.0)
    first, *_ = _run(recipe, 1)
    assert int(first.split()[0]) > 5 * 64
    assert _tree(tmp_path / "made.gvd") == unharmed


def test_each_end_of_a_build_can_be_cut_off(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments after the rows: before the stamp, between the renames, before the clean-up."""
    recipe = load_recipe(_recipe(inputs, tmp_path))
    whole = _tree(build(recipe).path)
    steps = ("save_plan", "publish", "atomic_write_json", "shutil.rmtree")
    for step in steps:
        for late in (False, True):
            real = shutil.rmtree if step == "shutil.rmtree" else getattr(
                sys.modules["ghostvis_mega.data.build"], step
            )  # fmt: skip

            def stop(*arguments: object, _real: object = real, _late: bool = late) -> None:
                if _late:
                    _real(*arguments)  # type: ignore[operator]
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(f"ghostvis_mega.data.build.{step}", stop)
                build(recipe, force=True)
            assert _tree(build(recipe, force=False).path) == whole
            assert not list(tmp_path.glob("*.tmp-*"))


def test_a_second_build_does_nothing(inputs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(_recipe(inputs, tmp_path))
    assert not build(recipe).up_to_date
    before = time.process_time()
    again = build(recipe)
    assert again.up_to_date
    assert time.process_time() - before < 0.5
    # A changed recipe is another dataset, and replaces the one that was built.
    changed = recipe.model_copy(update={"max_tokens": 16})
    assert build(changed).manifest.digest != again.manifest.digest


def test_a_changed_picture_is_another_input(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs, tmp_path / "inputs")
    recipe = load_recipe(_recipe(tmp_path / "inputs", tmp_path))
    first = build(recipe)
    picture = tmp_path / "inputs" / "photos" / "3.png"
    times = (picture.stat().st_atime_ns, picture.stat().st_mtime_ns)
    touched = (times[0], times[1] + 10**9)
    # Only touched: the bytes say that nothing is to be done, the time alone does not know.
    os.utime(picture, ns=touched)
    assert build(recipe, check=True).up_to_date
    assert build(recipe).up_to_date
    Image.effect_noise((40, 30), 9).save(picture)
    second = build(recipe)
    assert not second.up_to_date and second.manifest.digest != first.manifest.digest
    # Other bytes under the old size and time: only --check looks.
    data = bytearray(picture.read_bytes())
    stat = picture.stat()
    data[-5] ^= 1
    picture.write_bytes(data)
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert build(recipe).up_to_date
    assert not build(recipe, check=True).up_to_date
    assert build(recipe, check=True).up_to_date
    assert build(recipe).up_to_date


def test_what_no_build_made_is_not_replaced(inputs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(_recipe(inputs, tmp_path))
    (tmp_path / "made.gvd").mkdir()
    with pytest.raises(DataError, match=r"made\.gvd exists already"):
        build(recipe)
    with pytest.raises(DataError, match="is not a prepared dataset"):
        build(recipe, force=True)


def test_two_builds_do_not_mix(inputs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(_recipe(inputs, tmp_path))
    work = tmp_path / f"made.gvd.tmp-build-{recipe.key()}"
    with hold(work), pytest.raises(DataError, match="another build is at work"):
        build(recipe)
    assert not build(recipe).up_to_date


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "a.gvd"
    dead, alive = (tmp_path / f"a.gvd.tmp-{pid}-0123abcd" for pid in (ended.pid, os.getpid()))
    other = tmp_path / "b.gvd.tmp-1-0123abcd"
    for directory in (dead, alive, other):
        directory.mkdir()
    clear_leftovers(path)
    assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)
    old = tmp_path / f"{dead.name}-old"
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    clear_leftovers(path)
    assert (path / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tokenizer": {}}, "`tokenizer`.*give either `file` or `vocab`"),
        ({"sources": []}, "`sources`"),
        ({"outt": 1}, "`outt`"),
        ({"template": "alpaca"}, "no chat template 'alpaca'"),
        ({"sources": [{"format": "tsv"}]}, "no input format 'tsv'"),
        ({"plans": [{"seq_length": 0, "tokens_per_image": 1}]}, r"`plans\.0\.seq_length`"),
    ],
)
def test_recipes_are_checked(
    inputs: Path, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    path = _recipe(inputs, tmp_path)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(DataError, match=expected):
        load_recipe(path)


def test_workers_change_no_byte(inputs: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    def source() -> Source:
        spec = SourceSpec(format="llava", path=inputs / "rows.json", images=inputs / "photos")
        return open_source(spec)

    for workers in (1, 2):
        path = tmp_path / f"{workers}.gvd"
        ingest([source()], tokenizer=tokenizer, path=path, workers=workers)
    assert _tree(tmp_path / "1.gvd") == _tree(tmp_path / "2.gvd")
    counted = dry_run([source()], tokenizer=tokenizer)
    manifest = json.loads((tmp_path / "1.gvd" / "manifest.json").read_text())
    counts = manifest["counts"]
    assert (counted.samples, counted.images) == (counts["samples"], counts["images"])
    assert (counted.tokens, counted.trained_tokens) == (counts["tokens"], counts["trained_tokens"])
    assert sum(counted.rejected.values()) == counts["rejected"]
    assert counted.rows == ROWS - 64


def test_an_error_of_a_reader_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def rows() -> object:
        yield Row("a", ())
        raise DataError("the file ends here")

    with pytest.raises(DataError, match="the file ends here"):
        ingest([Source("bad", rows())], tokenizer=tokenizer, path=tmp_path / "a.gvd", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_progress_says_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress(total=1000, clock=lambda: now[0])
    progress(100, 0)
    now[0] = 6.0
    progress(400, 3)
    now[0] = 7.0
    progress(450, 3)
    progress.end()
    assert capsys.readouterr().err == "400 rows, 3 rejected, 50 rows/s, 40 %, 12.0s left\n"
