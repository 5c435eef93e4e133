"""merge, split and sample: nothing is lost, changed or mixed up, and the same comes out twice."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data import manifest as names
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.manifest import read_manifest
from ghostvis_mega.data.operations.copying import Part, Piece, write_parts
from ghostvis_mega.data.operations.selection import picture_groups, seeded_order
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

Content = tuple[str, tuple[str, ...], bytes, bytes, tuple[int, ...], tuple[bytes, ...]]

ORDER_OF_8 = [0, 6, 2, 7, 1, 5, 4, 3]


def content(dataset: Dataset, index: int) -> Content:
    """All of a sample, pictures as bytes, without the ids that depend on the dataset."""
    sample = dataset.sample(index)
    pictures = tuple(dataset.image_bytes(image_id) for image_id in sample.image_ids)
    tokens, spans = sample.tokens.tobytes(), sample.spans.tobytes()
    return sample.key, sample.answers, tokens, spans, sample.image_positions, pictures


def contents(*paths: Path) -> list[Content]:
    """Contents of all samples, dataset after dataset; every dataset must be green."""
    found = []
    for path in paths:
        assert verify_dataset(path, deep=True) == []
        with Dataset.open(path) as dataset:
            found += [content(dataset, index) for index in range(dataset.num_samples)]
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()  # what was printed before, training a tokenizer for example, is not its
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a dataset."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def single_rows(rows: list[Row]) -> list[Row]:
    """Rows with at most one picture: pictures do not tie all rows together."""
    return [row for row in rows if len(row.images) < 2]


@pytest.mark.parametrize("by", ["sample", "image"])
def test_split_and_merge_give_the_same_samples(
    by: str, rows: list[Row], build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = build(single_rows(rows), "whole.gvd")
    parts = [whole.with_name(f"{by}-{number}.gvd") for number in range(3)]
    shares = ("0.5", "0.3", "0.2")
    arguments = [
        argument
        for part, share in zip(parts, shares, strict=True)
        for argument in ("--part", f"{part}={share}")
    ]
    code, text, _ = run(capsys, "split", whole, *arguments, "--by", by, "--seed", 3, "--json")
    assert code == 0
    summaries = json.loads(text)["parts"]
    expected = contents(whole)
    found = contents(*parts)
    assert sorted(found) == sorted(expected)
    assert len({key for key, *_ in found}) == len(expected)
    merged = whole.with_name("merged.gvd")
    assert run(capsys, "merge", *parts, "--out", merged)[0] == 0
    assert contents(merged) == found
    assert read_manifest(merged).counts.images == read_manifest(whole).counts.images
    for part, summary, share in zip(parts, summaries, shares, strict=True):
        counts = read_manifest(part).counts.model_dump()
        assert {key: summary[key] for key in counts if key != "rejected"} == {
            key: value for key, value in counts.items() if key != "rejected"
        }
        assert summary["digest"] == read_manifest(part).digest
        # Groups of rows with one picture are up to a fifth of this small set.
        allowed = 1 if by == "sample" else 0.2 * len(expected)
        assert abs(counts["samples"] - float(share) * len(expected)) <= allowed


def test_by_image_keeps_pictures_in_one_part_and_by_sample_does_not(
    rows: list[Row], build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = build(single_rows(rows), "whole.gvd")
    shared = {}
    for by in ("image", "sample"):
        parts = [whole.with_name(f"{by}-{number}.gvd") for number in range(2)]
        options = ("--part", f"{parts[0]}=1/2", "--part", f"{parts[1]}=1/2", "--by", by)
        assert run(capsys, "split", whole, *options)[0] == 0
        pictures = []
        for part in parts:
            with Dataset.open(part) as dataset:
                hashes = dataset.image_index["blake2b"]
                pictures.append({value.tobytes() for value in hashes})
        shared[by] = pictures[0] & pictures[1]
    assert not shared["image"]
    assert shared["sample"]


def test_groups_follow_pictures_through_third_samples(
    rows: list[Row], build: Callable[..., Path]
) -> None:
    """0-1, 1-2 and 3-4 share pictures pairwise, 5 has none."""
    files = rows[4].images[0].parent
    picture = [files / f"{number}.png" for number in (0, 2, 4, 6)]

    def row(key: str, *images: Path) -> Row:
        turns = (Turn("user", (*(ImagePart() for _ in images), "is")), Turn("assistant", ("no",)))
        return Row(key, turns, images)

    path = build(
        [
            row("a", picture[0]),
            row("b", picture[1], picture[0]),
            row("c", picture[1]),
            row("d", picture[2]),
            row("e", picture[2], picture[2]),
            row("f"),
            row("g", picture[3]),
        ]
    )
    with Dataset.open(path) as dataset:
        assert picture_groups(dataset).tolist() == [0, 0, 0, 3, 3, 5, 6]


def test_split_by_keys(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("row/7\nrow/30\n\n")
    chosen, rest = tmp_path / "chosen.gvd", tmp_path / "rest.gvd"
    options = ("--keys", keys, "--part", chosen, "--part", rest)
    assert run(capsys, "split", dataset.path, *options)[0] == 0
    assert [key for key, *_ in contents(chosen)] == ["row/7", "row/30"]
    assert sorted(contents(chosen, rest)) == sorted(contents(dataset.path))
    keys.write_text("row/7\nrow/700\n")
    code, _, error = run(capsys, "split", dataset.path, *options, "--force")
    assert (code, error.count("\n")) == (2, 1)
    assert "'row/700'" in error


def test_sample_is_repeatable_and_ordered(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = contents(dataset.path)
    paths = {}
    for name, options in {
        "a": ("--number", 15, "--seed", 1),
        "b": ("--share", "0.25", "--seed", 1),
        "c": ("--number", 15, "--seed", 2),
    }.items():
        paths[name] = tmp_path / f"{name}.gvd"
        assert run(capsys, "sample", dataset.path, *options, "--out", paths[name])[0] == 0
    assert tree(paths["a"]) == tree(paths["b"])
    assert tree(paths["a"]) != tree(paths["c"])
    found = contents(paths["a"])
    places = [expected.index(sample) for sample in found]
    assert len(places) == 15
    assert places == sorted(places)


def test_seeded_order_is_a_fixed_permutation() -> None:
    """The order is part of what a seed means: it must never change between versions."""
    assert sorted(seeded_order(1000, 5).tolist()) == list(range(1000))
    assert seeded_order(8, 0).tolist() == seeded_order(8, 0).tolist()
    assert seeded_order(8, 0).tolist() != seeded_order(8, 1).tolist()
    assert seeded_order(8, 0).tolist() == ORDER_OF_8


def test_manifest_names_parents_and_operation(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, both = tmp_path / "small.gvd", tmp_path / "both.gvd"
    assert run(capsys, "sample", dataset.path, "--number", 5, "--out", small)[0] == 0
    assert run(capsys, "merge", dataset.path, small, "--out", both)[0] == 0
    sources = json.loads((both / names.MANIFEST_FILE).read_text())["sources"]
    assert [source["parent"] for source in sources] == [
        dataset.manifest.digest,
        read_manifest(small).digest,
    ]
    assert [source["rows"] for source in sources] == [dataset.num_samples, 5]
    assert {source["operation"] for source in sources} == {"merge"}
    (source,) = json.loads((small / names.MANIFEST_FILE).read_text())["sources"]
    assert source["operation"] == "sample of=5 seed=0"
    with Dataset.open(both) as opened:
        assert opened.sample_index["source"].tolist() == [0] * dataset.num_samples + [1] * 5
        assert opened.num_images == dataset.num_images


def test_other_tokenizers_do_not_merge(
    dataset: Dataset, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Tokenizer = train_tokenizer(
        ["other words", "altogether"], vocab_size=300, path=tmp_path / "other.model"
    )
    other, out = tmp_path / "other.gvd", tmp_path / "out.gvd"
    ingest([Source("other", rows)], tokenizer=tokenizer, path=other)
    code, _, error = run(capsys, "merge", dataset.path, other, "--out", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "another tokenizer" in error
    assert not out.exists()


def test_bad_requests_are_one_sentence_and_write_nothing(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, a, b = dataset.path, tmp_path / "a.gvd", tmp_path / "b.gvd"
    before = tree(source)
    cases: dict[str, tuple[object, ...]] = {
        "must make 1": ("split", source, "--part", f"{a}=0.5", "--part", f"{b}=0.4"),
        "is not a number": ("split", source, "--part", f"{a}=half", "--part", f"{b}=0.5"),
        "above 0": ("split", source, "--part", f"{a}=0", "--part", f"{b}=1"),
        "has no share": ("split", source, "--part", a, "--part", f"{b}=1"),
        "at least two --part": ("split", source, "--part", f"{a}=1"),
        "one name": ("split", source, "--part", f"{a}=0.5", "--part", f"{a}=0.5"),
        "would hold no sample": ("split", source, "--part", f"{a}=0.001", "--part", f"{b}=0.999"),
        "is read": ("sample", source, "--number", 3, "--out", source, "--force"),
        "say how many": ("sample", source, "--out", a),
        "61 samples": ("sample", source, "--number", 61, "--out", a),
        "at least two datasets": ("merge", source, "--out", a),
        "cannot be read": ("split", source, "--keys", b, "--part", a, "--part", b),
        "not a directory": ("merge", source, a, "--out", b),
    }
    for words, arguments in cases.items():
        code, _, error = run(capsys, *arguments)
        assert (code, words in error, error.count("\n")) == (2, True, 1), (words, error)
        assert list(tmp_path.iterdir()) == []
    assert tree(source) == before


def test_dry_run_writes_nothing_and_says_the_truth(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gvd"
    arguments = ("sample", dataset.path, "--number", 9, "--out", out, "--json")
    planned = json.loads(run(capsys, *arguments, "--dry-run")[1])["parts"][0]
    assert not out.exists()
    written = json.loads(run(capsys, *arguments)[1])["parts"][0]
    assert planned == {key: value for key, value in written.items() if key != "digest"}


def test_a_damaged_parent_leaves_nothing(
    dataset: Dataset, rows: list[Row], build: Callable[..., Path]
) -> None:
    path = build(rows, "bad.gvd")
    tar = path / "media/00000.tar"
    data = bytearray(tar.read_bytes())
    data[int(dataset.image_index["offset"][-1]) + 40] ^= 1
    tar.write_bytes(data)
    with Dataset.open(path) as damaged:
        everything = (Piece(damaged, np.arange(damaged.num_samples)),)
        parts = [Part(path.with_name(f"{name}.gvd"), everything) for name in "ab"]
        with pytest.raises(DataError, match="does not match its crc"):
            write_parts(parts)
    assert [file.name for file in path.parent.iterdir()] == ["bad.gvd"]


@pytest.mark.parametrize("command", ["merge", "split", "sample"])
def test_help_holds_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"python -m tools.preprocess {command}" in " ".join(text.replace("|", " ").split())
