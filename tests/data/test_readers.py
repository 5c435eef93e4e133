"""Each public format, laid out exactly as published, comes out as conversations or reasons."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import BadRow, Row, Source, TokenRow, ingest
from ghostvis_mega.data.layout import Role
from ghostvis_mega.data.readers.common import documents
from ghostvis_mega.data.readers.registry import FORMATS, SourceSpec, open_source, source_text
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError, MissingDependencyError


def _photo(path: Path, shade: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 18), (shade, 40, 10)).save(path)
    return path


def _write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def _rows(format: str, path: Path, **more: object) -> list[Row | BadRow]:
    return list(open_source(SourceSpec(format=format, path=path, **more)).rows)


def _said(row: Row | BadRow) -> list[tuple[str, str]]:
    assert isinstance(row, Row), row
    return [(turn.role, turn.text) for turn in row.turns]


def _reasons(rows: list[Row | BadRow]) -> list[str]:
    return [row.reason for row in rows if isinstance(row, BadRow)]


COCO = {
    "info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017},
    "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "x"}],
    "images": [
        {
            "license": 4, "file_name": "000000397133.jpg",
            "coco_url": "http://images.cocodataset.org/val2017/000000397133.jpg",
            "height": 427, "width": 640, "date_captured": "2013-11-14 17:02:52",
            "flickr_url": "http://farm7.staticflickr.com/6116/x.jpg", "id": 397133,
        }
    ],
    "annotations": [
        {"image_id": 397133, "id": 370509, "caption": "A man is in a kitchen.\n"},
        {"image_id": 397133, "id": 370510, "caption": "Two people cook."},
        {"image_id": 5, "id": 370511, "caption": "No such picture."},
        {"image_id": 397133, "id": 370512},
        "junk",
    ],
}  # fmt: skip


def test_coco_captions(tmp_path: Path) -> None:
    _photo(tmp_path / "val2017" / "000000397133.jpg")
    path = _write(tmp_path / "captions_val2017.json", COCO)
    rows = _rows("coco-captions", path, images=tmp_path / "val2017")
    assert rows[0].key == "captions_val2017/000000/370509"
    assert _said(rows[0])[1] == ("assistant", "A man is in a kitchen.")
    assert rows[1].answers == ("A man is in a kitchen.", "Two people cook.")
    assert rows[0].images == (tmp_path / "val2017" / "000000397133.jpg",)
    assert _reasons(rows) == ["unknown_image", "missing_field", "bad_row"]


def _vqa_files(folder: Path) -> tuple[Path, Path]:
    given = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "mesh", "net"]
    head = {"info": {}, "license": {}, "data_subtype": "train2014", "data_type": "mscoco"}
    questions = {
        **head,
        "task_type": "Open-Ended",
        "questions": [
            {"image_id": 458752, "question": "What is this?", "question_id": 458752000},
            {"image_id": 458752, "question": "Not answered?", "question_id": 458752001},
            {"image_id": "x", "question": "Odd id?", "question_id": 458752000},
        ],
    }
    annotations = {
        **head,
        "annotations": [
            {
                "question_type": "what is this",
                "multiple_choice_answer": "net",
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                    for number, answer in enumerate(given)
                ],
                "image_id": 458752,
                "answer_type": "other",
                "question_id": 458752000,
            }
        ],
    }
    return (
        _write(folder / "v2_OpenEnded_mscoco_train2014_questions.json", questions),
        _write(folder / "v2_mscoco_train2014_annotations.json", annotations),
    )


def test_vqav2(tmp_path: Path) -> None:
    picture = _photo(tmp_path / "train2014" / "COCO_train2014_000000458752.jpg")
    questions, annotations = _vqa_files(tmp_path)
    rows = _rows("vqav2", questions, annotations=annotations, images=picture.parent)
    assert _said(rows[0]) == [("user", "What is this?"), ("assistant", "net")]
    assert rows[0].images == (picture,)
    assert len(rows[0].answers) == 10
    assert rows[0].answers[3] == "netting"
    assert _reasons(rows) == ["no_answer", "bad_field"]
    with pytest.raises(DataError, match="--annotations"):
        _rows("vqav2", questions)
    with pytest.raises(DataError, match="no list 'questions'"):
        _rows("vqav2", annotations, annotations=annotations)


def test_textvqa(tmp_path: Path) -> None:
    picture = _photo(tmp_path / "train_images" / "0054c91397f2fe05.jpg")
    row = {
        "question": "what is the brand of phone?", "image_id": "0054c91397f2fe05",
        "image_classes": ["Belt", "Mobile phone"], "image_width": 1024, "image_height": 730,
        "flickr_original_url": "https://farm6.staticflickr.com/a_o.jpg",
        "flickr_300k_url": "https://c2.staticflickr.com/b.jpg",
        "answers": ["nokia"] * 9 + ["toshiba"], "question_tokens": ["what", "is"],
        "question_id": 0, "set_name": "train",
    }  # fmt: skip
    unanswered = {key: value for key, value in row.items() if key != "answers"}
    document = {
        "dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1",
        "data": [row, unanswered],
    }  # fmt: skip
    path = _write(tmp_path / "TextVQA_0.5.1_train.json", document)
    rows = _rows("textvqa", path, images=picture.parent)
    assert _said(rows[0]) == [("user", "what is the brand of phone?"), ("assistant", "nokia")]
    assert rows[0].images == (picture,)
    assert len(rows[0].answers) == 10
    assert _reasons(rows) == ["missing_field"]


def test_chartqa(tmp_path: Path) -> None:
    picture = _photo(tmp_path / "png" / "41699051005347.png")
    path = _write(
        tmp_path / "train_human.json",
        [
            {"imgname": picture.name, "query": "How many food items?", "label": "14"},
            {"imgname": "../x.png", "query": "?", "label": "1"},
        ],
    )
    rows = _rows("chartqa", path, images=tmp_path / "png")
    assert _said(rows[0]) == [("user", "How many food items?"), ("assistant", "14")]
    assert (rows[0].images, rows[0].answers) == ((picture,), ("14",))
    assert _reasons(rows) == ["image_outside_folder"]


def test_llava_665k(tmp_path: Path) -> None:
    picture = _photo(tmp_path / "coco" / "train2017" / "000000033471.jpg")
    rows = [
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
                {"from": "gpt", "value": "The bus is white and red."},
                {"from": "human", "value": "Is it moving?"},
                {"from": "gpt", "value": "It is parked."},
            ],
        },
        {
            "id": "wgByO4Y_0",
            "model": "",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        },
    ]
    path = _write(tmp_path / "llava_v1_5_mix665k.json", rows)
    found = _rows("llava", path, images=tmp_path)
    assert found[0].images == (picture,)
    assert [role for role, _ in _said(found[0])] == ["user", "assistant"] * 2
    assert _said(found[1]) == [("user", "Hi"), ("assistant", "Hello")]


MESSAGES = [
    [{"role": "user", "content": "Hi <image>"}, {"role": "assistant", "content": "Hello."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ],
]


def test_chat_parquet_and_json_lines_agree(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = [{"messages": messages, "source": "smol-magpie-ultra"} for messages in MESSAGES]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "train.parquet")
    lines = [json.dumps(row) for row in table]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, "{broken", '{"messages": 3}']))
    stored = _rows("chat", tmp_path / "train.parquet")
    written = _rows("chat", tmp_path / "train.jsonl")
    assert stored == written[:2]
    # A chat has no pictures, so the word is a word.
    assert _said(stored[0])[0] == ("user", "Hi <image>")
    assert stored[0].images == ()
    assert _reasons(written) == ["bad_json", "bad_field"]
    with pytest.raises(DataError, match="has no column 'text', only messages, source"):
        _rows("text", tmp_path / "train.parquet")


def test_fineweb_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {
        "text": "The web page.", "id": "<urn:uuid:1>", "dump": "CC-MAIN-2013-20",
        "url": "http://a.example", "date": "2013-05-18T10:42:00Z", "file_path": "s3://x",
        "language": "en", "language_score": 0.97, "token_count": 4,
    }  # fmt: skip
    parquet.write_table(
        pyarrow.Table.from_pylist([row, {**row, "text": None}]), tmp_path / "000_00000.parquet"
    )
    rows = _rows("text", tmp_path / "000_00000.parquet")
    assert _said(rows[0]) == [("text", "The web page.")]
    assert rows[0].key == "000_00000/000000/<urn:uuid:1>"
    assert _reasons(rows) == ["missing_field"]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "000_00000.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="cut.parquet is not a readable parquet file"):
        _rows("text", tmp_path / "cut.parquet")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[data\]"):
        _rows("text", tmp_path / "a.parquet")


def test_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, data in {
        "b.txt": b"two",
        "a.md": b"one",
        "sub/c.txt": b"\xff",
        "d.bin": b"x",
    }.items():
        (tmp_path / name).write_bytes(data)
    rows = _rows("text", tmp_path)
    assert [_said(row) for row in rows[:2]] == [[("text", "one")], [("text", "two")]]
    assert rows[0].key.endswith("/a.md")
    assert _reasons(rows) == ["bad_text"]
    assert _rows("text", tmp_path / "b.txt") == [
        Row(key="b/000000/b.txt", turns=rows[1].turns)  # the key starts with the input's name
    ]


def test_csv_with_captions_or_questions(tmp_path: Path) -> None:
    picture = _photo(tmp_path / "photos" / "1.png")
    captions, questions = tmp_path / "captions.csv", tmp_path / "questions.csv"
    with open(captions, "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["1.png", 'A "red" square'], ["2.png"]])
    questions.write_text("image,question,answer\nphotos/1.png,What?,A square\n")
    rows = _rows("csv", captions, images=tmp_path / "photos")
    assert _said(rows[0])[1] == ("assistant", 'A "red" square')
    assert _reasons(rows) == ["bad_row"]
    (row,) = _rows("csv", questions)
    assert row.images == (picture,)
    assert _said(row) == [("user", "What?"), ("assistant", "A square")]
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="needs a header line with `image`"):
        _rows("csv", tmp_path / "odd.csv")


def test_every_format_reaches_a_dataset(tmp_path: Path, tokenizer: Tokenizer) -> None:
    questions, annotations = _vqa_files(tmp_path)
    _photo(tmp_path / "train2014" / "COCO_train2014_000000458752.jpg")
    (tmp_path / "story.txt").write_text("what color is the shape? " * 20)
    specs = [
        SourceSpec(
            format="vqav2", path=questions, annotations=annotations, images=tmp_path / "train2014"
        ),
        SourceSpec(format="text", path=tmp_path / "story.txt", license="CC0"),
    ]
    path = tmp_path / "made.gvd"
    sources = [open_source(spec) for spec in specs]
    manifest = ingest(sources, tokenizer=tokenizer, path=path, max_tokens=32)
    assert [source.license for source in manifest.sources] == ["", "CC0"]
    with Dataset.open(path) as dataset:
        assert len(dataset.sample(0).answers) == 10
        parts = [dataset.sample(number) for number in range(1, dataset.num_samples)]
        assert len(parts) > 2
        assert [part.key for part in parts[:2]] == ["story/000000/story.txt#0",
                                                    "story/000000/story.txt#1"]  # fmt: skip
        text = "".join(dataset.tokenizer.decode(part.tokens) for part in parts)
        assert text == (tmp_path / "story.txt").read_text()


def test_texts_for_a_tokenizer(tmp_path: Path) -> None:
    path = _write(tmp_path / "chat.json", [{"messages": messages} for messages in MESSAGES])
    spec = SourceSpec(format="chat", path=path)
    assert list(source_text(spec)) == ["Hi <image>", "Hello.", "Be brief.", "2+2?", "4"]
    with pytest.raises(DataError, match=r"no input format 'tsv': use one of .*coco-captions"):
        open_source(SourceSpec(format="tsv", path=path))
    for name in set(FORMATS) - {"easy-vqa"}:
        with pytest.raises(DataError, match="needs"):
            open_source(SourceSpec(format=name))


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_lists_are_read_in_pieces(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostvis_mega.data.readers.common._CHUNK_CHARS", chunk)
    value = [12, "a]b,", {"c": [1, 2]}, [], -3.5e2, None, True]
    for indent in (None, 2):
        path = tmp_path / "a.json"
        path.write_text(f" \n{json.dumps(value, indent=indent)}\n")
        assert [row for _, row, _ in documents(path)] == value
    _write(tmp_path / "empty.json", [])
    assert list(documents(tmp_path / "empty.json")) == []
    for text in ("[1,2", "[1,,2]", "[1] 2", "[1,]", "", "[1 2]", '["a'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="bad.json is not valid JSON"):
            list(documents(tmp_path / "bad.json"))


def test_ready_tokens_are_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    end = tokenizer.specials["endoftext"]
    rows = [
        TokenRow("a", np.array([*tokenizer.encode("is there a circle?"), end], dtype=np.uint16)),
        TokenRow("b", np.array([5, tokenizer.vocab_size])),
        TokenRow("c", np.array([tokenizer.specials["image"]])),
        TokenRow("d", np.array([], dtype=np.uint16)),
    ]
    path = tmp_path / "made.gvd"
    ingest([Source("ready", rows)], tokenizer=tokenizer, path=path)
    ledger = [json.loads(line) for line in (path / "rejects.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in ledger] == [
        "unknown_token", "document_image", "empty_document"
    ]  # fmt: skip
    with Dataset.open(path) as dataset:
        assert dataset.sample(0).tokens.tolist() == rows[0].tokens.tolist()
        assert [Role(role) for role in dataset.sample(0).spans["role"]] == [Role.TEXT, Role.EOS]


def test_a_document_is_continued(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "what color is the shape? the shape is blue."
    (tmp_path / "a.txt").write_text(text)
    source = open_source(SourceSpec(format="text", path=tmp_path / "a.txt"))
    ingest([source], tokenizer=tokenizer, path=tmp_path / "made.gvd")
    with Dataset.open(tmp_path / "made.gvd") as dataset:
        tokens, image_ids, rest, begin = dataset.prompt(0)
        assert begin + rest == text
        assert (len(tokens), image_ids) == (dataset.manifest.counts.tokens // 2, ())
