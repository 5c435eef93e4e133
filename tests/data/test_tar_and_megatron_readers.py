"""What we exported comes back as it was; hostile tars and cut indexes do no harm."""

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.megatron import export_megatron
from ghostvis_mega.data.export.webdataset import export_webdataset
from ghostvis_mega.data.ingest import BadRow, Row, TokenRow
from ghostvis_mega.data.readers import tars
from ghostvis_mega.data.readers.megatron import megatron_rows
from ghostvis_mega.data.readers.webdataset import webdataset_rows
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

PROMPT = "Describe it."


def picture(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **more: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    member.linkname = more.get("link", "")
    return member.tobuf(tarfile.GNU_FORMAT)


def entry(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def good(key: str) -> bytes:
    return entry(f"{key}.png", picture()) + entry(f"{key}.txt", b"a red square")


def read(path: Path, data: bytes) -> list[Row | BadRow]:
    path.write_bytes(data)
    return list(webdataset_rows(path, prompt=PROMPT))


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def contents(path: Path) -> list[tuple]:
    assert verify_dataset(path, deep=True) == []
    with Dataset.open(path) as dataset:
        found = []
        for index in range(dataset.num_samples):
            one = dataset.sample(index)
            pictures = [dataset.image_bytes(image_id) for image_id in one.image_ids]
            found.append((one.key, one.answers, one.tokens.tolist(), one.spans.tobytes(), pictures))
        return found


def test_webdataset_round_trip_through_the_commands(
    dataset: Dataset, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Out and in again: the same tokens, spans, keys, answers and bytes of pictures."""
    wds, back = tmp_path / "wds", tmp_path / "back.gvd"
    export_webdataset(dataset, wds, shard_bytes=20_000)
    options = ("--tokenizer", tokenizer.path, "--out", back)
    assert run("ingest", "webdataset", wds, *options) == 0
    assert contents(back) == contents(dataset.path)


def test_text_that_looks_like_a_placeholder_comes_back_as_text(
    build: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(picture())
    turns = (
        Turn("user", ("say <image>", ImagePart(), "<|image|>\n")),
        Turn("assistant", (" <image>",)),
    )
    path = build([Row("a.b/c", turns, (file,))])
    with Dataset.open(path) as opened:
        export_webdataset(opened, tmp_path / "wds")
    (row,) = webdataset_rows(tmp_path / "wds", prompt=PROMPT)
    assert row == Row("a.b/c", turns, (picture(),))


def test_layouts_of_other_people(tmp_path: Path) -> None:
    """Captions, LLaVA conversations, folders in names, upper case, PAX headers of long names."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    long = "folder/" + "x" * 150 + "/sample"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {
            "./a.JPG": picture(1),
            "./a.txt": b"a caption\n",
            "b.png": picture(2),
            "b.json": json.dumps({"conversations": turns, "url": "http://x"}).encode(),
            "c.json": json.dumps({"caption": "x"}).encode(),
            "c.webp": picture(3),
            f"{long}.png": picture(4),
            f"{long}.txt": b"long",
        }.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5  # a fraction needs a PAX record
            tar.addfile(member, io.BytesIO(data))
    rows = read(tmp_path / "t.tar", buffer.getvalue())
    captions = [row.turns[1].text for row in rows if isinstance(row, Row)]
    assert captions == ["a caption", "Red.", "x", "long"]
    assert [row.images for row in rows if isinstance(row, Row)] == [
        (picture(n),) for n in range(1, 5)
    ]
    assert rows[0].turns[0] == Turn("user", (ImagePart(), PROMPT))
    assert rows[3].key == f"t/{long}"


NEGATIVE_SIZE = b"14 size=-9999\n".ljust(512, b"\0") + header("y.png")
HOSTILE = {
    "unsafe_name": [
        entry("../x.png", picture()),
        entry("/etc/x.png", picture()),
        entry("a/../../x.png", picture()),
    ],
    "not_a_file": [
        header("x.png", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        header("x.png", kind=tarfile.LNKTYPE, link="good.png"),
        header("x.png", kind=tarfile.CHRTYPE),
        header("x.png", kind=tarfile.BLKTYPE),
        header("x.png", kind=tarfile.FIFOTYPE),
        header("x.png", kind=b"Z"),
    ],
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_hostile_members_are_refused_and_the_rest_is_read(reason: str, tmp_path: Path) -> None:
    for number, bad in enumerate(HOSTILE[reason]):
        rows = read(tmp_path / f"{number}.tar", good("a") + bad + good("b") + bytes(1024))
        kinds = [row.reason if isinstance(row, BadRow) else "good" for row in rows]
        assert kinds == ["good", reason, "good"]
    assert {file.suffix for file in tmp_path.iterdir()} == {".tar"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (header("x.png", 1 << 50), "truncated_tar"),
        (header("x.png", 600) + bytes(10), "truncated_tar"),
        (header("x.png")[:300], "broken_tar"),
        (b"\xff" * 512, "broken_tar"),
        (header("x", 1 << 50, kind=b"L"), "truncated_tar"),
        (header("x", 1 << 17, kind=b"x") + bytes(1 << 17), "broken_tar"),
        (header("x", 20, kind=b"x") + b"999999999 path=x\n".ljust(512, b"\0"), "broken_tar"),
        (header("x", 14, kind=b"x") + NEGATIVE_SIZE, "broken_tar"),
        (b"", "truncated_tar"),
    ],
)
def test_broken_tars_end_with_a_reason(bad: bytes, reason: str, tmp_path: Path) -> None:
    rows = read(tmp_path / "t.tar", good("a") + bad)
    assert isinstance(rows[-1], BadRow)
    assert rows[-1].reason == reason
    assert len(rows) <= 2


def test_files_beyond_the_limit_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 1000)
    data = good("a") + entry("b.png", bytes(1001)) + entry("b.txt", b"x") + good("c") + bytes(1024)
    rows = read(tmp_path / "t.tar", data)
    kinds = [row.reason if isinstance(row, BadRow) else "good" for row in rows]
    assert kinds == ["good", "too_large", "good"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": picture()}, "no_text"),
        ({"a.json": b"{"}, "bad_json"),
        ({"a.json": b"[]"}, "bad_row"),
        ({"a.json": b"{}"}, "no_text"),
        ({"a.txt": b"\xff"}, "bad_text"),
        ({"a.json": b'{"caption": "x", "answers": [1]}'}, "bad_field"),
        ({"a.json": b'{"messages": [{"content": [{"type": "image_url"}], "role": "user"}]}'},
         "image_is_url"),
        ({"a.json": b'{"messages": [{"content": [{"type": "image"}], "role": "user"}]}'},
         "missing_image"),
        ({"a.json": b'{"messages": [], "images": ["png"]}'}, "missing_image"),
        ({"a.json": b'{"messages": [], "images": [[]]}'}, "missing_image"),
        ({"a.json": b'{"messages": [{"content": [3], "role": "user"}]}'}, "bad_row"),
        ({"a.json": b'{"messages": 3}'}, "bad_field"),
    ],
)  # fmt: skip
def test_bad_samples_have_a_reason(members: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    data = b"".join(entry(name, one) for name, one in members.items())
    rows = read(tmp_path / "t.tar", data + good("z") + bytes(1024))
    assert [type(row) for row in rows] == [BadRow, Row]
    assert rows[0].reason == reason


def test_a_thousand_damaged_tars_neither_crash_nor_hang(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    whole = np.frombuffer(good("a") + good("b") + bytes(1024), dtype=np.uint8)
    for _ in range(1000):
        data = whole.copy()
        places = generator.integers(0, len(data), generator.integers(1, 30))
        data[places] = generator.integers(0, 256, len(places))
        assert read(tmp_path / "t.tar", data[: generator.integers(1, len(data) + 1)].tobytes())


@pytest.fixture
def text(rows: list[Row], build: Callable[..., Path]) -> Path:
    """A prepared dataset without pictures, exported to text.bin and text.idx beside it."""
    path = build([row for row in rows if not row.images] * 3, "text.gvd")
    with Dataset.open(path) as dataset:
        export_megatron(dataset, path.with_name("text"), append_eod=True)
    return path


def test_megatron_round_trip_keeps_every_token(text: Path, tokenizer: Tokenizer) -> None:
    back, again = text.with_name("back.gvd"), text.with_name("again")
    options = ("--tokenizer", tokenizer.path, "--out", back)
    assert run("ingest", "megatron", text.with_name("text"), *options) == 0
    assert verify_dataset(back, deep=True) == []
    end = tokenizer.specials["endoftext"]
    with Dataset.open(text) as first, Dataset.open(back) as second:
        assert second.num_samples == first.num_samples
        for index in range(first.num_samples):
            tokens = first.sample(index).tokens.tolist()
            assert second.sample(index).tokens.tolist() == [*tokens, end]
        export_megatron(second, again)
    for ending in (".bin", ".idx"):
        written = text.with_name(f"text{ending}").read_bytes()
        assert again.with_name(f"again{ending}").read_bytes() == written


def test_what_megatron_writes_is_read(tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Documents of several sequences, and the int32 type of large vocabularies."""
    monkeypatch.setenv("RANK", "0")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(f"{tmp_path}/x.bin", dtype=np.int32)
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(np.array([6]), [1])
    builder.finalize(f"{tmp_path}/x.idx")
    (tmp_path / "x.json").write_text('{"tokenizer": {"sha256": "abc"}}')
    rows = list(megatron_rows(tmp_path / "x.bin", tokenizer_sha256="abc"))
    assert [(row.key, row.tokens.tolist()) for row in rows] == [
        ("x/000000", [1, 2, 3, 4, 5]),
        ("x/000001", [6]),
    ]
    assert all(isinstance(row, TokenRow) for row in rows)
    assert len(list(megatron_rows(tmp_path / "x", tokenizer_sha256="abc", limit=1))) == 1


def test_another_tokenizer_is_refused_with_the_reason(
    text: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train_tokenizer(["other words"], vocab_size=300, path=text.with_name("other.model"))
    out, prefix = text.with_name("out.gvd"), text.with_name("text")
    assert run("ingest", "megatron", prefix, "--tokenizer", other.path, "--out", out) == 2
    assert "its ids would mean other text" in capsys.readouterr().err
    prefix.with_name("text.json").unlink()
    assert run("ingest", "megatron", prefix, "--tokenizer", tokenizer.path, "--out", out) == 2
    assert "nothing says which tokenizer" in capsys.readouterr().err
    assert not out.exists()


def _cut(data: bytes) -> bytes:
    return data[:-1]


def _changed(offset: int, layout: str, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        struct.pack_into(layout, changed, offset, value)
        return bytes(changed)

    return change


@pytest.mark.parametrize(
    ("ending", "damage", "words"),
    [
        (".bin", _cut, "its index says"),
        (".idx", _cut, "it is cut or damaged"),
        (".idx", lambda data: b"", "is no index"),
        (".idx", lambda data: data + bytes(30), "has modes"),
        (".idx", _changed(0, "<B", 0), "is no index"),
        (".idx", _changed(9, "<Q", 2), "has version 2"),
        (".idx", _changed(17, "<B", 7), "holds no token ids"),
        (".idx", _changed(17, "<B", 99), "holds no token ids"),
        (".idx", _changed(18, "<Q", 1 << 62), "expected"),
        (".idx", _changed(34, "<i", -5), "do not follow"),
        (".idx", _changed(34 + 4 * 30, "<q", 1 << 40), "do not follow"),
        (".idx", _changed(34 + 12 * 30, "<q", 4), "do not cover"),
    ],
)
def test_damaged_files_are_refused_before_a_token_is_read(
    ending: str, damage: Callable[[bytes], bytes], words: str, text: Path, tokenizer: Tokenizer
) -> None:
    file = text.with_name(f"text{ending}")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=words):
        next(megatron_rows(text.with_name("text"), tokenizer_sha256=tokenizer.sha256))
