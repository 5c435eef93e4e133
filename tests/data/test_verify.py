"""`verify` finds what changed, what is missing, what is too much, and what was written wrongly."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data import encode as encode_module
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import BadRow, Row
from ghostvis_mega.data.plan import PlanParams, build_plan, save_plan
from ghostvis_mega.data.template import ChatTemplate, Encoded, Turn
from ghostvis_mega.data.verify import verify_dataset
from tools.preprocess.cli import main

PARAMS = PlanParams("balanced", 192, 8, 0)


@pytest.fixture
def path(build: Callable[..., Path], rows: list[Row]) -> Path:
    """A dataset with a ledger that is not empty and a stored plan."""
    path = build([*rows[:12], BadRow("bad", "bad_json", "x")])
    with Dataset.open(path) as opened:
        save_plan(opened, build_plan(opened, PARAMS))
    assert verify_dataset(path, deep=True) == []
    return path


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_any_flipped_bit_is_found(path: Path) -> None:
    """400 places over all files, each file at least once, any bit."""
    rng = random.Random(0)
    files = [file for file in _files(path) if file.stat().st_size]
    assert len(files) > 15
    for number in range(400):
        file = files[number] if number < len(files) else rng.choice(files)
        data = file.read_bytes()
        place = rng.randrange(len(data))
        file.write_bytes(
            data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        )
        assert verify_dataset(path, deep=False), f"byte {place} of {file}"
        file.write_bytes(data)
    assert verify_dataset(path, deep=False) == []


def test_any_missing_or_cut_or_longer_file_is_found(path: Path) -> None:
    for file in _files(path):
        data = file.read_bytes()
        for changed in (None, data[:-1], data + b"\0", data[: len(data) // 2]):
            if changed == data:
                continue
            file.unlink()
            if changed is not None:
                file.write_bytes(changed)
            problems = verify_dataset(path, deep=False)
            assert any(file.name in problem or file.parent.name in problem for problem in problems)
            file.write_bytes(data)
    assert verify_dataset(path, deep=False) == []


def test_all_damage_is_told_at_once(path: Path) -> None:
    (path / "samples/keys.bin").unlink()
    spans = bytearray((path / "samples/spans.bin").read_bytes())
    spans[0] ^= 1
    (path / "samples/spans.bin").write_bytes(spans)
    (path / "more.txt").write_text("x")
    told = "\n".join(verify_dataset(path, deep=True))
    for name in ("keys.bin is missing", "spans.bin: its SHA-256", "more.txt is not in the"):
        assert name in told


@pytest.mark.parametrize(
    "name", ["notes.txt", "media/00001.tar", "samples/.hidden", "plans/notes", "plans/PLAN/a/b"]
)
def test_files_that_do_not_belong_are_found(path: Path, name: str) -> None:
    (plan,) = (path / "plans").iterdir()
    file = path / name.replace("PLAN", plan.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    (problem,) = (p for p in verify_dataset(path, deep=False) if "delete it" in p)
    assert file.name in problem or file.parent.name in problem


def test_plans_of_another_dataset_are_found(
    path: Path, build: Callable[..., Path], rows: list[Row]
) -> None:
    other = build(rows[:20], "other.gvd")
    shutil.copytree(path / "plans", other / "plans")
    (problem,) = verify_dataset(other, deep=False)
    assert "plan of another dataset" in problem


def test_a_plan_that_its_settings_do_not_give_is_found(path: Path) -> None:
    with Dataset.open(path) as opened:
        plan = build_plan(opened, PARAMS)
        save_plan(opened, replace(plan, samples=plan.samples[::-1].copy()))
    assert verify_dataset(path, deep=False) == []
    (problem,) = verify_dataset(path, deep=True)
    assert "is not the plan of its settings" in problem


def _encode_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[Encoded], Encoded]) -> None:
    real = ChatTemplate.encode

    def wrong(self: ChatTemplate, turns: list[Turn], *, num_images: int) -> Encoded:
        return change(real(self, turns, num_images=num_images))

    monkeypatch.setattr(ChatTemplate, "encode", wrong)


def _wrong_header(encoded: Encoded) -> Encoded:
    """The name of the role is another piece; checksums are made of the wrong tokens."""
    tokens = encoded.tokens.copy()
    tokens[1] += 1
    return replace(encoded, tokens=tokens)


def _train_all(encoded: Encoded) -> Encoded:
    spans = encoded.spans.copy()
    spans["train"] = 1
    return replace(encoded, spans=spans)


def _overlap(encoded: Encoded) -> Encoded:
    spans = encoded.spans.copy()
    spans["len"][0] += 3
    return replace(encoded, spans=spans)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_wrong_header, "gives other tokens or spans"),
        (_train_all, "train text that is no answer"),
        (_overlap, "spans overlap"),
    ],
)
def test_deep_finds_what_was_written_wrongly(
    build: Callable[..., Path],
    rows: list[Row],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Encoded], Encoded],
    words: str,
) -> None:
    with monkeypatch.context() as patched:
        _encode_with(patched, change)
        path = build(rows)
    assert verify_dataset(path, deep=False) == []
    problems = verify_dataset(path, deep=True)
    assert problems and all(words in problem or "other tokens" in problem for problem in problems)
    assert any(words in problem for problem in problems)


def test_deep_compares_pictures_with_their_records(
    build: Callable[..., Path], rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encode_module.probe
    monkeypatch.setattr(encode_module, "probe", lambda data: replace(real(data), width=13))
    path = build(rows)
    assert verify_dataset(path, deep=False) == []
    problems = verify_dataset(path, deep=True)
    assert len(problems) == 5
    assert "image 0: its record says (2, 13, 10" in problems[0]


def test_progress_reaches_the_end(path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(what: str, done: int, total: int) -> None:
        assert done >= seen.get(what, (0, 0))[0]
        seen[what] = (done, total)

    verify_dataset(path, deep=True, progress=progress)
    assert set(seen) == {"bytes", "samples", "texts", "images", "plans"}
    assert all(done == total > 0 for done, total in seen.values())


def test_the_command_reports_as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: str) -> tuple[int, dict]:
        try:
            code = main(["verify", str(path), "--json", *more])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, json.loads(capsys.readouterr().out)

    code, report = run("--deep")
    assert (code, report["ok"], report["problems"], report["deep"]) == (0, True, [], True)
    tokens = path / "samples/tokens.bin"
    tokens.write_bytes(np.zeros(1, dtype=np.uint8).tobytes() + tokens.read_bytes()[1:])
    code, report = run()
    assert (code, report["ok"], len(report["problems"])) == (1, False, 1)
