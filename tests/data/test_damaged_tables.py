"""Damage in tables of rows costs the rows that it is in, with a reason for each, and no others."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from ghostvis_mega.data.ingest import BadRow, Row, ingest
from ghostvis_mega.data.readers.registry import SourceSpec, open_source
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError

HEADER = "image,caption\n"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def _rows(format: str, path: Path, **more: object) -> list[Row | BadRow]:
    return list(open_source(SourceSpec(format=format, path=path, **more)).rows)


def _csv(tmp_path: Path, text: str | bytes) -> list[tuple[str, str]]:
    """(key, what the row says or why it was dropped) of a table."""
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [
        (row.key, f"{row.reason}: {row.detail}" if isinstance(row, BadRow) else row.answers[0])
        for row in _rows("csv", path)
    ]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ('a.png,"torn\nb.png,plain\nc.png,"quoted, well"\n', "line 2: ',' expected after '\"'"),
        ('a.png,"torn\nb.png,plain\nc.png,plain\n', "line 2: unexpected end of data"),
        ('a.png,"closed" early\nb.png,plain\nc.png,"1"\n', "line 2: ',' expected after '\"'"),
    ],
)
def test_a_torn_quote_costs_one_row(rows: str, problem: str, tmp_path: Path) -> None:
    found = _csv(tmp_path, HEADER + rows)
    assert [key for key, _ in found] == ["t/000000", "t/000001", "t/000002"]
    assert found[0][1] == f"bad_csv: {problem}; read on after this line"
    assert found[1][1] == "plain"
    assert not found[2][1].startswith("bad")


def test_whole_quotes_may_hold_lines_and_commas(tmp_path: Path) -> None:
    found = _csv(tmp_path, HEADER + '\na.png,"two\nlines, ""and"" more"\n\nb.png,x\n')
    assert [text for _, text in found] == ['two\nlines, "and" more', "x"]


def test_lines_are_counted_as_they_stand_in_the_file(tmp_path: Path) -> None:
    found = _csv(tmp_path, HEADER + 'a.png,"t\nb.png,"u\nc.png,ok\nd.png,"v')
    assert [text.split(":")[1].strip() for _, text in found if text.startswith("bad_csv")] == [
        "line 2", "line 3", "line 5",
    ]  # fmt: skip
    assert found[2] == ("t/000002", "ok")


def test_long_cells_and_odd_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "x" * 200_000
    found = _csv(tmp_path, f"{HEADER}a.png,{long}\n".encode() + b"b.png,\xff\nc.png,x\n")
    assert [text for _, text in found] == [long, "\udcff", "x"]
    before = csv.field_size_limit(1000)
    monkeypatch.setattr("ghostvis_mega.data.readers.text._MAX_CELL_CHARS", 1000)
    try:
        (_, dropped), kept = _csv(tmp_path, f"{HEADER}a.png,{long}\nc.png,x\n")
    finally:
        csv.field_size_limit(before)
    assert dropped.startswith("bad_csv: line 2: field larger than field limit (1000)")
    assert kept == ("t/000001", "x")


def test_a_table_with_odd_bytes_is_ingested_but_for_them(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_bytes(
        b"\xef\xbb\xbfimage,caption\na.png,good\na.png,caf\xe9\na\xff.png,x\na.png,fine\n"
    )
    (tmp_path / "t.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps([{"messages": CHAT}] * 2).encode()[:-2] + b', "id": "\xff"}]'
    )
    for format, name, stored, reasons in (
        ("csv", "t.csv", 2, ["bad_text", "bad_image_name"]),
        ("chat", "t.json", 1, ["bad_text"]),
    ):
        out = tmp_path / f"{format}.gvd"
        source = open_source(SourceSpec(format=format, path=tmp_path / name))
        assert ingest([source], tokenizer=tokenizer, path=out).counts.samples == stored
        ledger = (out / "rejects.jsonl").read_text().splitlines()
        assert [json.loads(line)["reason"] for line in ledger] == reasons


def test_a_header_that_is_no_csv_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="t.csv is not a CSV file: line 1: "):
        _csv(tmp_path, 'image,"caption\na.png,x\n')
    with pytest.raises(DataError, match="needs a header line"):
        _csv(tmp_path, "")


def test_json_lists_and_objects_may_begin_with_a_mark_and_hold_odd_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    body = json.dumps([{"imgname": "a.png", "query": "?", "label": "X"}] * 2).encode()
    path.write_bytes(b"\xef\xbb\xbf" + body.replace(b"X", b"\xff", 1))
    assert [row.answers[0] for row in _rows("chartqa", path, images=tmp_path)] == ["\udcff", "X"]
    row = {"question": "?", "image_id": "1", "answers": ["X"], "question_id": 0}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"data": [row]}).encode())
    assert [row.answers for row in _rows("textvqa", path, images=tmp_path)] == [("X",)]
    path.write_bytes(b'[{"messages": 1}, \xff]')
    with pytest.raises(DataError, match="t.json is not valid JSON"):
        _rows("chat", path)


def test_broken_lines_of_chartqa_say_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{broken\n{"imgname": "a.png", "query": "?", "label": "3"}\n')
    broken, good = _rows("chartqa", path, images=tmp_path)
    assert isinstance(good, Row)
    assert (broken.reason, "Expecting property name" in broken.detail) == ("bad_json", True)
