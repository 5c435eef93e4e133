"""What is written is what is read; what was changed is found."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import BadRow, Row, Source, ingest
from ghostvis_mega.data.manifest import MANIFEST_FILE, find_problems, read_manifest
from ghostvis_mega.data.plan import PlanParams, build_plan, read_plan, save_plan
from ghostvis_mega.data.template import ChatTemplate, ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError

PARAMS = PlanParams(algorithm="balanced", seq_length=128, tokens_per_image=4, seed=0)


def _tree(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def test_samples_and_images_round_trip(dataset: Dataset, rows: list[Row]) -> None:
    template = ChatTemplate(dataset.tokenizer)
    assert dataset.num_samples == len(rows)
    for number, row in enumerate(rows):
        sample = dataset.sample(number)
        encoded = template.encode(row.turns, num_images=len(row.images))
        assert sample.tokens.dtype == np.int32
        assert sample.tokens.tolist() == encoded.tokens.tolist()
        assert sample.spans.tolist() == encoded.spans.tolist()
        assert (sample.key, sample.answers) == (row.key, row.answers)
        assert sample.image_positions == encoded.image_positions
        stored = [dataset.image_bytes(image_id) for image_id in sample.image_ids]
        assert stored == [path.read_bytes() for path in row.images]


def test_equal_bytes_are_stored_once(dataset: Dataset, rows: list[Row]) -> None:
    assert dataset.num_images == len({path.read_bytes() for row in rows for path in row.images})
    assert dataset.num_images < len({path for row in rows for path in row.images})


def test_prompt_ends_with_the_last_assistant_header(dataset: Dataset, rows: list[Row]) -> None:
    for number in (0, 3, 4, 5):
        tokens, image_ids, answer, question = dataset.prompt(number)
        sample = dataset.sample(number)
        assert tokens.tolist() == sample.tokens[: len(tokens)].tolist()
        assert dataset.tokenizer.decode(tokens).endswith("assistant\n")
        last = rows[number].turns[-1].text
        assert dataset.tokenizer.decode(sample.tokens[len(tokens) :]) == f"{last}\n"
        assert (answer, question) == (rows[number].answers[0], rows[number].turns[-2].text)
        assert image_ids == sample.image_ids


def test_ingest_is_deterministic(build: Callable[..., Path], rows: list[Row]) -> None:
    assert _tree(build(rows, "a.gvd")) == _tree(build(rows, "b.gvd"))
    assert _tree(build(rows[1:], "c.gvd")) != _tree(build(rows, "d.gvd"))


def test_shards_open_in_webdataset(dataset: Dataset) -> None:
    shard = dataset.path / "media" / "00000.tar"
    with open(shard, "rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])))
    assert [sample["__key__"] for sample in samples] == [
        f"{number:08d}" for number in range(dataset.num_images)
    ]
    assert [sample["png"] for sample in samples] == [
        dataset.image_bytes(number) for number in range(dataset.num_images)
    ]
    offsets = np.fromfile(f"{shard}.idx", dtype="<u8").tolist()
    with tarfile.open(shard, "r:") as tar:
        assert offsets[:-1] == [member.offset for member in tar.getmembers()]


def test_several_shards(
    build: Callable[..., Path], rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostvis_mega.data.writer.SHARD_BYTES", 1500)
    path = build(rows)
    assert len(list(path.glob("media/*.tar"))) > 1
    assert verify_dataset(path, deep=True) == []


def test_verify_passes_on_an_untouched_dataset(build: Callable[..., Path], rows: list[Row]) -> None:
    path = build(rows)
    with Dataset.open(path) as opened:
        save_plan(opened, build_plan(opened, PARAMS))
    assert verify_dataset(path, deep=True) == []


def test_one_flipped_byte_in_any_file_is_found(build: Callable[..., Path], rows: list[Row]) -> None:
    path = build([*rows, BadRow("bad", "bad_json", "for a ledger that is not empty")])
    with Dataset.open(path) as opened:
        directory = save_plan(opened, build_plan(opened, PARAMS))
    assert (directory / "plan.json").is_file()
    for name, data in _tree(path).items():
        for offset in {0, len(data) // 3, len(data) // 2, len(data) - 1} if data else ():
            _flip(path / name, offset)
            problems = verify_dataset(path, deep=False)
            assert problems, f"byte {offset} of {name}"
            (path / name).write_bytes(data)
    assert verify_dataset(path, deep=False) == []


@pytest.mark.parametrize("name", ["tokens.bin", "spans.bin", "images.ref"])
def test_damaged_samples_are_found_on_read(
    build: Callable[..., Path], rows: list[Row], name: str
) -> None:
    path = build(rows)
    _flip(path / "samples" / name, 5)
    opened = Dataset.open(path)  # opening stays cheap and does not look
    with pytest.raises(DataError, match="sample 0 .* does not match its crc"):
        opened.sample(0)
    assert opened.sample(20).key == "row/20"


def test_a_damaged_index_never_trains(build: Callable[..., Path], rows: list[Row]) -> None:
    """Any flipped bit of samples.idx ends in a sentence, not in other batches."""
    path = build(rows)
    file = path / "samples" / "samples.idx"
    original = file.read_bytes()

    def read_all() -> int:
        with Dataset.open(path) as opened:
            plan = build_plan(opened, PARAMS)
            for number in range(plan.num_packs):
                opened.gather(plan.pack(number))
            for index in plan.dropped.tolist():
                opened.sample(index)
            return len(plan.samples)

    assert read_all() == len(rows)
    for number in range(120):
        data = bytearray(original)
        data[(number * 37) % len(data)] ^= 1 << (number % 8)
        file.write_bytes(data)
        with pytest.raises(DataError):
            read_all()


@pytest.mark.parametrize("field", ["shard", "offset", "size", "crc32"])
def test_a_damaged_image_index_is_found_on_read(
    build: Callable[..., Path], rows: list[Row], field: str
) -> None:
    path = build(rows)
    with Dataset.open(path) as opened:
        dtype = opened.image_index.dtype
        start, width = dtype.fields[field][1], dtype.fields[field][0].itemsize
    original = (path / "media/images.idx").read_bytes()
    for bit in range(8 * width):
        data = bytearray(original)
        data[start + bit // 8] ^= 1 << (bit % 8)
        (path / "media/images.idx").write_bytes(data)
        with Dataset.open(path) as opened, pytest.raises(DataError, match="image 0"):
            opened.image_bytes(0)


def test_the_manifest_is_checked_to_the_last_byte(
    build: Callable[..., Path], rows: list[Row]
) -> None:
    file = build(rows) / MANIFEST_FILE
    file.write_bytes(file.read_bytes().removesuffix(b"\n") + b" ")
    assert "edited or damaged" in find_problems(file.parent, what="data.train")[0]


def test_damaged_keys_and_media_are_found_on_read(
    build: Callable[..., Path], rows: list[Row]
) -> None:
    path = build(rows)
    with Dataset.open(path) as opened:
        offset = int(opened.image_index["offset"][1])
    _flip(path / "media" / "00000.tar", offset + 40)
    _flip(path / "samples" / "answers.bin", 3)
    with Dataset.open(path) as opened:
        opened.image_bytes(0)
        with pytest.raises(DataError, match=r"image 1 in .*00000\.tar does not match its crc"):
            opened.image_bytes(1)
        with pytest.raises(DataError, match=r"answers\.bin is damaged"):
            opened.sample(0)


def test_records_that_contradict_each_other_are_refused(
    build: Callable[..., Path], rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right crc is no proof of right content: a wrong writer has one too."""
    real = ChatTemplate.encode

    def wrong(self: ChatTemplate, turns: list[Turn], *, num_images: int):  # noqa: ANN202
        encoded = real(self, turns, num_images=num_images)
        moved = tuple(position + 1 for position in encoded.image_positions)
        return type(encoded)(encoded.tokens, encoded.spans, moved)

    monkeypatch.setattr(ChatTemplate, "encode", wrong)
    with Dataset.open(build(rows)) as opened, pytest.raises(DataError, match="<.image.>"):
        opened.sample(0)


def test_rejected_rows_are_in_the_ledger(
    build: Callable[..., Path], rows: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>not found</html>")
    ask = (Turn("user", (ImagePart(), "q")), Turn("assistant", ("a",)))
    bad = [
        Row("no-file", ask, (tmp_path / "absent.png",)),
        Row("html", ask, (tmp_path / "page.png",)),
        Row("html-again", ask, (tmp_path / "page.png",)),
        Row("count", ask, ()),
        Row("key\ud800", ask[1:], ()),
        BadRow("json", "bad_json", "line 3"),
    ]
    path = build([bad[0], *rows, *bad[1:]])
    ledger = [json.loads(line) for line in (path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in ledger] == [
        ("no-file", "missing_image"),
        ("html", "not_an_image"),
        ("html-again", "not_an_image"),
        ("count", "placeholder_count"),
        ("key\ud800", "role_order"),
        ("json", "bad_json"),
    ]
    manifest = read_manifest(path)
    assert manifest.counts.rejected == manifest.sources[0].rejected == len(bad)
    assert manifest.sources[0].rows == len(bad) + len(rows)
    assert Dataset.open(path).num_samples == len(rows)


def test_a_stopped_ingest_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def breaking():  # noqa: ANN202
        yield BadRow("a", "bad_json", "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest([Source("s", breaking())], tokenizer=tokenizer, path=tmp_path / "x.gvd")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_replaced_only_by_force(
    build: Callable[..., Path], rows: list[Row], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = build(rows)
    before = _tree(path)
    with pytest.raises(DataError, match="exists already"):
        build(rows[:5])
    assert _tree(path) == before
    ingest([Source("made", rows[:5])], tokenizer=tokenizer, path=path, force=True)
    assert read_manifest(path).counts.samples == 5
    assert sorted(tmp_path.iterdir()) == [path]
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="not a prepared dataset, so --force"):
        ingest([Source("made", rows)], tokenizer=tokenizer, path=tmp_path / "mine", force=True)


def _edit(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a manifest with a right digest, as another version of this program would."""
    from ghostvis_mega.utils.files import canonical_json, document_digest

    document = json.loads((path / MANIFEST_FILE).read_text())
    change(document)
    document["digest"] = document_digest(document)
    (path / MANIFEST_FILE).write_bytes(canonical_json(document))


def test_problems_are_sentences(build: Callable[..., Path], rows: list[Row]) -> None:
    good = build(rows, "good.gvd")
    assert find_problems(good, what="data.train") == []

    def damaged(name: str, change: Callable[[Path], None]) -> str:
        copy = good.with_name(name)
        shutil.copytree(good, copy)
        change(copy)
        (first, *_) = find_problems(copy, what="data.train")
        assert first.startswith("data.train: ")
        with pytest.raises(DataError):
            Dataset.open(copy)
        return first

    manifest = MANIFEST_FILE
    cases: dict[str, Callable[[Path], None]] = {
        "is not a directory": shutil.rmtree,
        "holds no manifest.json": lambda copy: (copy / manifest).unlink(),
        "is not valid JSON": lambda copy: (copy / manifest).write_text("{"),
        "does not match its own digest": lambda copy: (copy / manifest).write_text(
            (copy / manifest).read_text().replace('"made"', '"fake"')
        ),
        "has schema 'gvd/2'": lambda copy: _edit(copy, lambda m: m.update(schema="gvd/2")),
        "is no manifest of a dataset": lambda copy: _edit(copy, lambda m: m.update(schema=7)),
        "outside of the dataset": lambda copy: _edit(
            copy, lambda m: m["files"].update({"../x": m["files"]["rejects.jsonl"]})
        ),
        "field `counts`": lambda copy: _edit(copy, lambda m: m.pop("counts")),
        "tokens.bin is missing": lambda copy: (copy / "samples/tokens.bin").unlink(),
        "bytes, the manifest says": lambda copy: (copy / "media/00000.tar").write_bytes(b"cut"),
        "has sha256": lambda copy: _flip(copy / "tokenizer.model", 50),
        "tokenizer.specials.image": lambda copy: _edit(
            copy, lambda m: m["tokenizer"]["specials"].pop("image")
        ),
    }
    for number, (words, change) in enumerate(cases.items()):
        assert words in damaged(f"bad{number}.gvd", change)


def test_a_later_minor_schema_is_read(build: Callable[..., Path], rows: list[Row]) -> None:
    path = build(rows)
    _edit(path, lambda m: m.update(schema="gvd/1.4", novelty={"a": 1}))
    assert Dataset.open(path).num_samples == len(rows)


def test_an_empty_dataset_is_a_problem(build: Callable[..., Path]) -> None:
    path = build([BadRow("a", "bad_json", "")])
    assert "holds no samples" in find_problems(path, what="data.train")[0]


def test_a_damaged_plan_is_refused(build: Callable[..., Path], rows: list[Row]) -> None:
    with Dataset.open(build(rows)) as opened:
        directory = save_plan(opened, build_plan(opened, PARAMS))
        assert read_plan(directory, PARAMS).num_packs > 1
        _flip(directory / "tokens.u32", 0)
        with pytest.raises(DataError, match="tokens.u32 is missing or damaged: delete"):
            read_plan(directory, PARAMS)
