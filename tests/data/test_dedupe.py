"""Planted duplicates and leaks are found; nothing else is lost."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row
from ghostvis_mega.data.operations.dedupe import DedupeParams, find_duplicates, find_leaks
from ghostvis_mega.data.operations.similarity import (
    NEAR_TEXT,
    jaccard,
    near_pictures,
    near_texts,
    picture_hash,
    picture_places,
    same_places,
    shingles,
)
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

WORDS = (
    "amber basin cedar delta ember fjord grove haven inlet jetty knoll lagoon meadow "
    "north orchard plain quarry ridge stream tundra upland valley willow yard"
)


def photo(seed: int) -> Image.Image:
    """A smooth random scene, as photographs are: unlike noise, it survives compression."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, fmt: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def words(seed: int, count: int = 40) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), count))


def always(*_: int) -> bool:
    """A second look that sees no difference."""
    return True


def text_row(key: str, question: str, answer: str = "yes") -> Row:
    return Row(key, (Turn("user", (question,)), Turn("assistant", (answer,))))


@pytest.fixture
def picture_row(tmp_path: Path) -> Callable[..., Row]:
    """Makes a row with one picture, stored as a file."""

    def _row(key: str, data: bytes, question: str, answer: str = "yes") -> Row:
        file = tmp_path / f"{key}.bin"
        file.write_bytes(data)
        turns = (Turn("user", (ImagePart(), question)), Turn("assistant", (answer,)))
        return Row(key, turns, (file,))

    return _row


@pytest.fixture
def planted(picture_row: Callable[..., Row]) -> list[Row]:
    """60 different rows, then planted ones whose key says what they are like."""
    rows = [text_row(f"text-{n}", words(n)) for n in range(30)]
    rows += [picture_row(f"photo-{n}", encoded(photo(n), "PNG"), words(100 + n)) for n in range(30)]
    edited = words(3).split()
    edited[20] = "zenith"
    half = [*words(4).split()[:20], *words(900, 20).split()]
    rows += [
        text_row("exact-text", words(2)),
        text_row("near-text", " ".join(edited)),
        picture_row("exact-both", encoded(photo(5), "PNG"), words(105)),
        picture_row("near-image", encoded(photo(6), "JPEG", quality=85), words(106)),
        # Unlike anything: half the text, another answer, another question on a known picture.
        text_row("half-text", " ".join(half)),
        text_row("other-answer", words(2), "no"),
        picture_row("other-question", encoded(photo(7), "PNG"), words(300)),
    ]
    return rows


@pytest.mark.parametrize(
    ("images", "text", "expected"),
    [
        ("exact", "exact", {"exact-text", "exact-both"}),
        ("near", "exact", {"exact-text", "exact-both", "near-image"}),
        ("exact", "near", {"exact-text", "exact-both", "near-text", "other-answer"}),
        ("near", "ignore", {"exact-both", "near-image", "other-question"}),
        ("ignore", "exact", {"exact-text", "exact-both", "near-image"}),
    ],
)
def test_planted_duplicates_are_found_and_nothing_else(
    images: str, text: str, expected: set[str], planted: list[Row], build: Callable[..., Path]
) -> None:
    with Dataset.open(build(planted)) as dataset:
        found = find_duplicates(dataset, DedupeParams(images=images, text=text))  # type: ignore[arg-type]
        keys = [dataset.sample_key(index)[0] for index in range(dataset.num_samples)]
        assert {keys[one.index] for one in found.dropped} == expected
        assert sorted([*found.keep.tolist(), *(one.index for one in found.dropped)]) == list(
            range(len(keys))
        )
        like = {keys[one.index]: one.detail for one in found.dropped}
        assert like.get("exact-text", "text-2") == "text-2"
        assert like.get("near-image", "photo-6") == "photo-6"


def test_leaks_are_found_in_every_way(
    planted: list[Row], picture_row: Callable[..., Row], build: Callable[..., Path]
) -> None:
    held_out = [
        text_row("eval-text", words(2)),
        picture_row("eval-photo", encoded(photo(6), "PNG"), words(700)),
        picture_row("eval-question", encoded(photo(800), "PNG"), words(109)),
    ]
    with Dataset.open(build(planted, "train.gvd")) as train:
        with Dataset.open(build(held_out, "eval.gvd")) as other:
            found = find_leaks(train, other, DedupeParams(images="near"))
            exact = find_leaks(train, other, DedupeParams())
        keys = [train.sample_key(index)[0] for index in range(train.num_samples)]
        leaks = {keys[one.index]: one.reason for one in found.dropped}
        assert leaks == {
            "text-2": "leaked_text",
            "exact-text": "leaked_text",
            "photo-6": "leaked_image",
            "near-image": "leaked_image",
        }
        assert {keys[one.index] for one in exact.dropped} == set(leaks) - {"near-image"}
        # The question of photo-9 alone is no leak: it asks about another picture.
        assert found.counts["same_text_other_picture"] == 1


def test_a_leak_is_seen_even_if_the_evaluation_set_repeats_itself() -> None:
    """0 and 1 are near, 2 is near 1 only: folding 1 into 0 would hide that 2 leaks."""
    hashes = np.array([0b0, 0b1111, 0b11111111], dtype=np.uint64)
    thumbnails = np.zeros((3, 48), dtype=np.uint8)
    assert near_pictures(hashes, thumbnails, alike=always).tolist() == [0, 0, 2]
    assert near_pictures(hashes, thumbnails, alike=always, references=2).tolist() == [0, 1, 1]


def test_every_pair_within_four_bits_is_found() -> None:
    """Against brute force, with planted distances 0 to 6."""
    generator = np.random.default_rng(0)
    base = generator.integers(0, 1 << 63, 300, dtype=np.uint64)
    flipped = base.copy()
    for place in range(len(base)):
        for bit in generator.choice(64, place % 7, replace=False).tolist():
            flipped[place] ^= np.uint64(1 << bit)
    hashes = np.concatenate([base, flipped])
    twins = near_pictures(hashes, np.zeros((600, 48), dtype=np.uint8), alike=always)
    expected = [place if place % 7 <= 4 else place + 300 for place in range(300)]
    assert twins.tolist() == [*range(300), *expected]


def test_color_keeps_equal_shapes_apart() -> None:
    """Grey hashes of one pattern in two colours agree; the pictures do not."""
    grey = np.asarray(photo(3).convert("L"))
    red, blue = np.zeros((2, *grey.shape, 3), dtype=np.uint8)
    red[..., 0], blue[..., 2] = grey // 2, grey
    (a, first), (b, second) = (
        picture_hash(encoded(Image.fromarray(pixels), "PNG")) for pixels in (red, blue)
    )
    hashes, thumbnails = np.array([a, a], dtype=np.uint64), np.stack([first, second])
    assert (a ^ b).bit_count() <= 4
    assert near_pictures(hashes, thumbnails, alike=always).tolist() == [0, 1]


def _twins(pictures: list[bytes], **changes: Any) -> np.ndarray:
    hashes, thumbnails = zip(*(picture_hash(data) for data in pictures), strict=True)
    places = [picture_places(data) for data in pictures]

    def alike(one: int, other: int) -> bool:
        return same_places(places[one], places[other])

    options = {"alike": alike, **changes}
    return near_pictures(np.array(hashes, dtype=np.uint64), np.stack(thumbnails), **options)


def _copies(data: bytes) -> list[bytes]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    larger = image.resize((width * 17 // 10, height * 17 // 10), Image.Resampling.BILINEAR)
    return [
        encoded(image, "JPEG", quality=85),
        encoded(image, "WEBP", quality=60),
        encoded(image.resize((width * 3 // 4, height * 3 // 4)), "PNG"),
        encoded(larger, "JPEG", quality=70),
    ]


def test_pictures_of_easy_vqa_are_no_duplicates_and_their_copies_are() -> None:
    """One background, other shapes, colours and places: the hash alone takes a fifth for twins."""
    easy_vqa = pytest.importorskip("easy_vqa")
    paths = easy_vqa.get_test_image_paths()
    pictures = [Path(path).read_bytes() for path in paths.values()]
    assert len(set(pictures)) == len(pictures) == 1000
    everyone = np.arange(1000)
    assert np.array_equal(_twins(pictures), everyone)
    assert (_twins(pictures, alike=always) != everyone).sum() > 150
    some = pictures[:100]
    twins = _twins([*some, *(copy for data in some for copy in _copies(data))])[100:]
    assert (twins == np.repeat(np.arange(100), 4)).mean() > 0.98


def test_the_second_look_sees_what_is_shown_anywhere() -> None:
    scene = photo(11)
    spot = scene.copy()
    spot.paste((255, 0, 0), (60, 40, 68, 47))
    original, changed = encoded(scene, "PNG"), encoded(spot, "PNG")
    assert _twins([original, changed, *_copies(original)]).tolist() == [0, 1, 0, 0, 0, 0]
    assert _twins([original, changed], alike=always).tolist() == [0, 0]


def test_near_texts_agree_with_brute_force() -> None:
    """Edited copies on both sides of the threshold."""
    generator = np.random.default_rng(1)
    texts = [generator.integers(0, 5000, 60) for _ in range(80)]
    for place in range(80):
        copy = texts[place].copy()
        edits = place % 6
        copy[generator.choice(60, edits, replace=False)] = 7000 + place
        texts.append(copy)
    texts += [np.array([1]), np.array([1, 2]), np.array([], dtype=np.int64)]
    sets = [shingles(text) for text in texts]
    expected = list(range(len(texts)))
    for place in range(80, 160):
        if jaccard(sets[place - 80], sets[place]) >= NEAR_TEXT:
            expected[place] = place - 80
    assert near_texts(texts).tolist() == expected
    assert 10 < sum(place != twin for place, twin in enumerate(expected)) < 70


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return code, capsys.readouterr().out


def test_command_reports_writes_and_ends_with_a_meaning(
    planted: list[Row], build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = build(planted, "source.gvd")
    out = source.with_name("clean.gvd")
    code, text = _run(capsys, "dedupe", source, "--json")
    report = json.loads(text)
    assert (code, report["found"], report["written"]) == (1, 2, None)
    assert report["samples_per_second"] > 0
    for option in ("--report", "--dry-run"):
        assert _run(capsys, "dedupe", source, "--out", out, option)[0] == 1
        assert not out.exists()
    code, text = _run(capsys, "dedupe", source, "--images", "near", "--out", out)
    assert code == 0
    assert "--against EVAL.gvd" in text
    assert "samples/s" in text
    assert verify_dataset(out, deep=True) == []
    ledger = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {(row["key"], row["reason"], row["detail"]) for row in ledger} == {
        ("exact-text", "duplicate", "text-2"),
        ("exact-both", "duplicate", "photo-5"),
        ("near-image", "duplicate", "photo-6"),
    }
    with Dataset.open(out) as dataset:
        keys = {dataset.sample_key(index)[0] for index in range(dataset.num_samples)}
    assert keys == {row.key for row in planted} - {row["key"] for row in ledger}
    assert _run(capsys, "dedupe", out, "--images", "near")[0] == 0
    assert _run(capsys, "dedupe", source, "--against", out)[0] == 1
    assert _run(capsys, "dedupe", source, "--images", "ignore", "--text", "ignore")[0] == 2
    with pytest.raises(DataError, match="nothing is left"):
        DedupeParams(images="ignore", text="ignore")
    assert "python -m tools.preprocess dedupe" in _run(capsys, "dedupe", "--help")[1]
