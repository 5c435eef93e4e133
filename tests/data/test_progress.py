"""How much of an input has been read, and the time left that is made of it."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostvis_mega.data.build import build
from ghostvis_mega.data.ingest import ingest
from ghostvis_mega.data.readers.meter import Meters
from ghostvis_mega.data.readers.registry import SourceSpec, open_source
from ghostvis_mega.data.recipe import load_recipe
from ghostvis_mega.data.tokenizer import Tokenizer
from tools.preprocess.progress import Progress, Steps

ROWS = 3000


def _chats() -> list[dict]:
    messages = [{"role": "user", "content": "is it?" * 40}, {"role": "assistant", "content": "no"}]
    return [{"messages": messages, "id": str(number)} for number in range(ROWS)]


def _write_json(folder: Path) -> SourceSpec:
    (folder / "a.json").write_text(json.dumps(_chats() * 4))
    return SourceSpec(format="chat", path=folder / "a.json")


def _write_lines(folder: Path) -> SourceSpec:
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in _chats()))
    return SourceSpec(format="llava", path=folder / "a.jsonl")


def _write_parquet(folder: Path) -> SourceSpec:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(_chats()), folder / "a.parquet")
    return SourceSpec(format="chat", path=folder / "a.parquet")


def _write_csv(folder: Path) -> SourceSpec:
    with open(folder / "a.csv", "w", newline="") as file:
        rows = ((f"{number}.png", "a caption") for number in range(ROWS))
        csv.writer(file).writerows([("image", "caption"), *rows])
    return SourceSpec(format="csv", path=folder / "a.csv")


def _write_tar(folder: Path) -> SourceSpec:
    for name in ("a", "b"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in range(50):
                for ending, data in (("txt", b"a caption"), ("jpg", b"x" * 100)):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return SourceSpec(format="webdataset", path=folder)


def _write_texts(folder: Path) -> SourceSpec:
    for number in range(20):
        (folder / f"{number}.txt").write_text("some text")
    return SourceSpec(format="text", path=folder)


def _write_captions(folder: Path) -> SourceSpec:
    rows = [{"image_id": 1, "id": number, "caption": "a cat"} for number in range(ROWS)]
    document = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": rows}
    (folder / "captions.json").write_text(json.dumps(document))
    return SourceSpec(format="coco-captions", path=folder / "captions.json", images=folder)


WRITERS = (
    *(_write_json, _write_lines, _write_parquet, _write_csv, _write_tar, _write_texts),
    _write_captions,
)


@pytest.mark.parametrize("write", WRITERS)
def test_readers_say_how_far_they_are(write: Callable[[Path], SourceSpec], tmp_path: Path) -> None:
    meters = Meters()
    source = open_source(write(tmp_path), meters)
    assert meters.share is None  # nothing has been opened
    shares = [meters.share for _ in source.rows]
    assert len(shares) > 15
    assert all(share is not None for share in shares)
    assert shares == sorted(shares) and 0 <= shares[0] < 0.9
    assert meters.share == 1.0
    assert any(0.1 < share < 0.9 for share in shares)


def test_inputs_are_weighted_by_their_size() -> None:
    meters = Meters()
    large, small = meters.part(3), meters.part(1)
    large.expect(10)
    large.add(5)
    assert meters.share == pytest.approx(0.375)
    large.add(5)
    small.expect(2)
    small.add(1)
    assert meters.share == pytest.approx(0.875)


def test_lines_hold_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now, meters = [0.0], Meters()
    progress = Progress(meters=meters, clock=lambda: now[0])
    part = meters.part(1)
    part.expect(100)
    part.add(20)
    progress(100, 0)  # went on after an interruption: this fifth took no time
    part.add(20)
    now[0] = 6.0
    progress(200, 0)
    assert capsys.readouterr().err == "200 rows, 0 rejected, 16.7 rows/s, 40 %, 18.0s left\n"
    # Without a size there is a rate, but no time left.
    now[0] = 0.0
    blind = Progress(meters=Meters(), clock=lambda: now[0])
    blind(0, 0)
    now[0] = 6.0
    blind(60, 0)
    assert capsys.readouterr().err == "60 rows, 0 rejected, 10 rows/s\n"


def test_ingest_and_build_report_shares(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _write_lines(tmp_path)
    meters, seen = Meters(), []
    source = open_source(SourceSpec(format="chat", path=tmp_path / "a.jsonl"), meters)
    ingest(
        [source],
        tokenizer=tokenizer,
        path=tmp_path / "a.gvd",
        progress=lambda rows, _: seen.append((rows, meters.share)),
    )
    assert seen[-1] == (ROWS, 1.0) and seen[0][1] < 0.2
    recipe = tmp_path / "recipe.yaml"
    sources = "sources: [{format: chat, path: a.jsonl}]"
    recipe.write_text(f"out: b.gvd\ntokenizer: {{vocab: 300}}\n{sources}\n")
    meters, shares = Meters(), []
    build(load_recipe(recipe), meters=meters, progress=lambda *_: shares.append(meters.share))
    assert shares == sorted(shares) and shares[-1] == 1.0 and shares[0] < 0.2


def test_steps_tell_rate_and_time_left_of_each_thing(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    steps = Steps(clock=lambda: now[0])
    for second, what, done in ((1, "files", 10), (10, "files", 100), (11, "images", 0)):
        now[0] = second
        steps(what, done, 1000)
    now[0] = 21.0
    steps("images", 500, 1000)
    assert capsys.readouterr().err == (
        "files: 100 of 1.00k, 11.1/s, 1m21s left\nimages: 500 of 1.00k, 50/s, 10.0s left\n"
    )
