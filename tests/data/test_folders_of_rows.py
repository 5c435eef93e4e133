"""Folders of tables are read, and an input that gives nothing is an error."""

import json
from pathlib import Path

import pytest

from ghostvis_mega.data.ingest import BadRow, Row
from ghostvis_mega.data.readers.meter import Meters
from ghostvis_mega.data.readers.registry import SourceSpec, open_source
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def _rows(format: str, path: Path, **more: object) -> list[Row | BadRow]:
    meters = Meters()
    rows = list(open_source(SourceSpec(format=format, path=path, **more), meters).rows)
    assert "limit" in more or meters.share == 1.0
    return rows


def _fill(folder: Path, row: dict) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (folder / "sub").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), folder / "b.parquet")
    (folder / "sub" / "b.jsonl").write_text(json.dumps({**row, "id": 7}) + "\n{broken\n")
    (folder / "a.json").write_text(json.dumps([row]))
    (folder / "infos.json").write_text('{"features": [1]}')


def test_chats_of_a_folder(tmp_path: Path) -> None:
    _fill(tmp_path / "mix", {"messages": CHAT})
    rows = _rows("chat", tmp_path / "mix")
    assert [row.key for row in rows] == [
        "mix/a.json/000000", "mix/b.parquet/000000", "mix/b.parquet/000001",
        "mix/sub/b.jsonl/000000/7", "mix/sub/b.jsonl/000001",
    ]  # fmt: skip
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["bad_json"]
    assert _rows("chat", tmp_path / "mix", limit=3) == rows[:3]


def test_documents_of_a_folder(tmp_path: Path) -> None:
    _fill(tmp_path / "mix", {"text": "a page"})
    assert len(_rows("text", tmp_path / "mix")) == 5
    (tmp_path / "mix" / "z.txt").write_text("a file")
    rows = _rows("text", tmp_path / "mix")
    assert [row.key for row in rows][:2] == ["mix/000000/z.txt", "mix/a.json/000000"]
    assert len(rows) == 6
    for limit in (1, 2, 6, 7):
        assert _rows("text", tmp_path / "mix", limit=limit) == rows[:limit]


def test_an_input_without_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "empty.csv").write_text("image,caption\n")
    for format, name in (
        ("text", "empty"), ("chat", "empty"), ("chat", "empty.json"), ("csv", "empty.csv"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"{name} has no row; the format {format} reads "):
            _rows(format, tmp_path / name)


def test_the_command_fails_if_nothing_was_stored(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    (tmp_path / "good.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n{broken\n")
    for format, name, expected in (
        ("chat", "rows.jsonl", 2), ("webdataset", "rows.jsonl", 2), ("chat", "good.jsonl", 0),
    ):  # fmt: skip
        command = ["ingest", format, str(tmp_path / name), "--tokenizer", str(tokenizer.path)]
        out = ["--out", str(tmp_path / f"{format}-{name}.gvd")]
        for more in (["--dry-run"], out):
            try:
                code: object = main([*command, *more])
            except SystemExit as end:
                code = end.code
            assert code == expected
            problem = "error: no sample came of the input: all 1 rows were rejected"
            assert (problem in capsys.readouterr().err) == (expected == 2)
