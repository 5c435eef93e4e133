"""The commands people run: what they print, what they refuse, and that they are repeatable."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from tools.preprocess.cli import main

COMMANDS = (
    *("train-tokenizer", "ingest", "tokenize", "build", "plan", "stats", "inspect", "verify"),
    *("dedupe", "merge", "split", "sample", "demo-blend"),
    *("export webdataset", "export energon", "export megatron"),
)


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA file with every good and bad kind of row, its pictures, and a tokenizer."""
    folder = tmp_path_factory.mktemp("llava")
    (folder / "photos" / "sub").mkdir(parents=True)
    for number in range(3):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 16), (80 * number, 0, 0)).save(buffer, "JPEG")
        (folder / "photos" / "sub" / f"{number}.jpg").write_bytes(buffer.getvalue())
    (folder / "photos" / "cut.jpg").write_bytes(buffer.getvalue()[:-9])
    (folder / "secret.jpg").write_bytes(buffer.getvalue())
    (folder / "photos" / "link.jpg").symlink_to(folder / "secret.jpg")

    def row(question: str, answer: str = "A cat.", **more: object) -> dict:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, **more}

    rows = [
        row("<image>\nWhat is this?", id="a", image="sub/0.jpg"),
        row("Hello, <b>you</b>."),
        row("Same? <image><image>", image=["sub/1.jpg", "sub/2.jpg"]),
        row("<image>\nx", image="https://example.org/a.jpg"),
        row("<image>\nx", image="../secret.jpg"),
        row("<image>\nx", image="/etc/hostname"),
        row("<image>\nx", image="link.jpg"),
        row("<image>\nx", image="absent.jpg"),
        row("<image>\nx", image="cut.jpg"),
        row("x", image="sub/0.jpg"),
        row("<image>", answer="<image> here", image="sub/0.jpg"),
        row("x", answer="  "),
        {"conversations": [{"from": "alien", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"conversations": [{"from": "human"}]},
        {"conversations": "none"},
        "not an object",
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    lines = [json.dumps(rows[0]), "", "{broken", json.dumps(rows[1])]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    arguments = ["train-tokenizer", "--from", "llava", str(folder / "rows.json")]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--vocab", "300", "--out", str(folder / "tok.model")])
    assert end.value.code == 0
    return folder


REASONS = [
    "image_is_url",
    "image_outside_folder",
    "image_outside_folder",
    "image_outside_folder",
    "missing_image",
    "truncated",
    "placeholder_count",
    "assistant_image",
    "empty_answer",
    "unknown_role",
    "bad_turn",
    "bad_row",
    "bad_row",
]


def _ingest(folder: Path, out: Path, rows: str = "rows.json") -> list[object]:
    return [
        "ingest", "llava", folder / rows, "--images", folder / "photos",
        "--tokenizer", folder / "tok.model", "--out", out,
    ]  # fmt: skip


def test_llava_rows_arrive_or_are_in_the_ledger(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.gvd"
    code, text, _ = _run(capsys, *_ingest(folder, out))
    assert code == 0
    assert "3 samples, 3 images" in text
    assert "13 rows rejected" in text
    ledger = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in ledger] == REASONS
    with Dataset.open(out) as dataset:
        first, second, third = (dataset.sample(number) for number in range(3))
        assert first.key == "rows/000000/a"
        assert dataset.prompt(0)[2:] == ("A cat.", "What is this?")
        assert dataset.prompt(1)[2:] == ("A cat.", "Hello, <b>you</b>.")
        assert len(third.image_ids) == 2
        assert second.image_ids == ()
        assert dataset.image_bytes(0) == (folder / "photos/sub/0.jpg").read_bytes()


def test_json_lines_name_the_broken_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.gvd"
    code, text, _ = _run(capsys, *_ingest(folder, out, "lines.jsonl"), "--json")
    assert code == 0
    assert json.loads(text)["samples"] == 2
    (row,) = (json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines())
    assert (row["key"], row["reason"]) == ("lines/000002", "bad_json")


def test_a_dataset_goes_through_all_commands(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.gvd"
    sizes = ("--seq-length", 200, "--tokens-per-image", 8)
    assert _run(capsys, *_ingest(folder, out))[0] == 0
    code, text, _ = _run(capsys, "plan", out, *sizes, "--json")
    assert code == 0
    plan = json.loads(text)
    assert Path(plan["path"], "plan.json").is_file()
    assert plan["dropped"] == 0
    code, text, _ = _run(capsys, "stats", out, *sizes, "--json")
    assert code == 0
    stats = json.loads(text)
    assert stats["packing"]["balanced"]["fill"] == pytest.approx(plan["fill"], abs=1e-4)
    assert stats["several_images_samples"] == stats["text_only_samples"] == 1
    assert _run(capsys, "stats", out, *sizes)[1].count(" padding waste ") == 6
    assert _run(capsys, "verify", out, "--deep")[0] == 0
    data = bytearray((out / "samples/keys.bin").read_bytes())
    data[-1] ^= 1
    (out / "samples/keys.bin").write_bytes(data)
    code, text, _ = _run(capsys, "verify", out)
    assert code == 1
    assert "keys.bin" in text


def test_bad_input_is_one_sentence_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = tmp_path / "good.gvd", tmp_path / "out.gvd"
    assert _run(capsys, *_ingest(folder, good))[0] == 0
    (folder / "object.json").write_text("{}")
    (folder / "broken.json").write_text("[")
    ingest = _ingest(folder, out)
    cases = {
        "exists already": _ingest(folder, good),
        "absent.json cannot be read": _ingest(folder, out, "absent.json"),
        "expected a list of rows": _ingest(folder, out, "object.json"),
        "is not valid JSON": _ingest(folder, out, "broken.json"),
        "needs a file of rows": [*ingest[:2], *ingest[3:]],
        "give their folder with --images": [*ingest[:3], *ingest[5:]],
        "not a directory": [*ingest[:4], "nowhere", *ingest[5:]],
        "does not exist": [*ingest[:6], "absent.model", *ingest[7:]],
        "absent.gvd is not a directory": ["verify", tmp_path / "absent.gvd"],
        "no sample": ["plan", good, "--seq-length", 3, "--tokens-per-image", 1],
    }
    for words, arguments in cases.items():
        code, _, error = _run(capsys, *arguments)
        assert code == 2, words
        assert words in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert _run(capsys, "plan", good, "--seq-length", "many")[0] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"python -m tools.preprocess {command}" in " ".join(text.replace("|", " ").split())


def test_easy_vqa_ingests_to_the_same_bytes_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("easy_vqa")
    model = tmp_path / "tok.model"
    train = ("train-tokenizer", "--from", "easy-vqa", "--vocab", 512, "--out", model, "--json")
    code, text, _ = _run(capsys, *train)
    assert code == 0
    assert json.loads(text)["vocab_size"] == 512
    digests = set()
    for name in ("a.gvd", "b.gvd"):
        arguments = ("ingest", "easy-vqa", "--split", "test", "--limit", 400, "--json")
        out = tmp_path / name
        code, text, _ = _run(capsys, *arguments, "--tokenizer", model, "--out", out)
        assert code == 0
        digests.add(json.loads(text)["digest"])
    assert len(digests) == 1
    with Dataset.open(tmp_path / "a.gvd") as dataset:
        assert dataset.num_samples == 400
        tokens, image_ids, answer, question = dataset.prompt(7)
        assert dataset.sample(7).key == "easy-vqa/test/000007"
        assert dataset.sample(7).answers == (answer,)
        assert question.endswith("?")
        assert len(image_ids) == 1
        assert tokens[-1] == dataset.tokenizer.encode("\n")[0]


def test_light_modules_do_not_import_torch() -> None:
    """Wrong settings and the commands must answer at once."""
    code = (
        "import sys; import ghostvis_mega.data.manifest; assert 'numpy' not in sys.modules; "
        "import tools.preprocess.cli; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_plans_for_context_parallel_runs(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = shutil.copytree(
        dataset.path, tmp_path / "made.gvd", ignore=shutil.ignore_patterns("plans")
    )
    sizes = ["--seq-length", 160, "--tokens-per-image", 8]
    plan = ["plan", made, *sizes, "--json"]
    planned = json.loads(_run(capsys, *plan, "--context-parallel", 4, "--dry-run")[1])
    assert planned["segment_align"] == 8 and planned["path"] is None
    assert not list((made / "plans").glob("*"))
    stored = json.loads(_run(capsys, *plan, "--segment-align", 8)[1])
    assert stored["packs"] == planned["packs"] and Path(stored["path"]).is_dir()
    code, _, error = _run(capsys, *plan, "--segment-align", 6, "--context-parallel", 4)
    assert code == 2 and "is not a multiple of 8" in error
    code, _, error = _run(capsys, *plan, "--context-parallel", 3)
    assert code == 2 and "seq_length=160 is not a multiple of segment_align=6" in error
    text = _run(capsys, "stats", made, *sizes, "--dp", 2, "--context-parallel", 4)[1]
    assert "samples to 8 positions" in text
    text = _run(capsys, "inspect", made, *sizes, "--pack", 0, "--context-parallel", 4)[1]
    borders = text.partition("cu_seqlens ")[2].splitlines()[0].split()
    assert len(borders) > 2 and all(int(border) % 8 == 0 for border in borders)


def test_plans_that_cut_samples(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = shutil.copytree(dataset.path, tmp_path / "made.gvd", dirs_exist_ok=True)
    sizes = ["--seq-length", 48, "--tokens-per-image", 8]
    plan = ["plan", made, *sizes, "--json"]
    report = json.loads(_run(capsys, *plan, "--algorithm", "concat")[1])
    assert report["cut"] and report["dropped"] == 0 and report["fill"] > 0.9
    dropping = json.loads(_run(capsys, *plan)[1])
    keeping = json.loads(_run(capsys, *plan, "--too-long", "truncate-at-turn")[1])
    assert dropping["dropped"] > keeping["dropped"]
    html = tmp_path / "packs.html"
    inspect = ["inspect", made, *sizes, "--algorithm", "concat", "--random", 9]
    assert "(stored tokens 0 to " in _run(capsys, *inspect)[1]
    (pack, *_) = json.loads(_run(capsys, *inspect, "--json")[1])["packs"]
    assert pack["cu_seqlens"][-1] == pack["seq_length"] == 48
    positions = [place for each in pack["segments"] for place in each["trained_positions"]]
    assert len(positions) == pack["trained_tokens"] and max(positions, default=0) < 48
    assert any(each["stored_tokens"] for each in pack["segments"])
    assert _run(capsys, *inspect, "--html", html)[0] == 0
    assert "(stored tokens 0 to " in html.read_text()
    text = _run(capsys, "stats", made, *sizes, "--dp", 2, "--too-long", "truncate-at-turn")[1]
    assert "concat " in text and "(truncate-at-turn)" in text
    assert _run(capsys, "verify", made, "--deep", "--workers", 3)[0] == 0
