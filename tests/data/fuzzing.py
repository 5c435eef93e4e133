"""Damaged pictures and rows, reproducible; run as a program it feeds them to `ingest`.

    python -m tests.data.fuzzing images 10000 /tmp/fuzz
    python -m tests.data.fuzzing rows 1000 /tmp/fuzz

A process of its own shows what a test cannot catch in itself: crashes, hangs, memory.
"""

import io
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import ingest
from ghostvis_mega.data.pixels import decode_rgb
from ghostvis_mega.data.readers.llava import llava_source
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer
from ghostvis_mega.data.verify import verify_dataset

EXTREMES = (0x00, 0x01, 0x7F, 0x80, 0xFF)
WORDS = ["what is this?", "a cat.", "yes", "no", "user", "assistant", "system", "tool"]


# --- pictures


def originals() -> list[bytes]:
    """Pictures of every stored encoding and mode, with detail in them."""
    picture = Image.effect_mandelbrot((72, 56), (-1.6, -1.1, 0.8, 1.1), 60)
    colour = Image.merge("RGB", (picture, picture.rotate(180), Image.effect_noise((72, 56), 60)))
    alpha = colour.convert("RGBA")
    alpha.putalpha(picture)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    wanted = [
        (colour, "PNG", {}),
        (colour, "JPEG", {"quality": 80}),
        (colour, "MPO", {"save_all": True, "append_images": [alpha.convert("RGB")]}),
        (colour, "JPEG", {"progressive": True, "exif": exif}),
        (colour.convert("CMYK"), "JPEG", {}),
        (picture, "JPEG", {"subsampling": 0}),
        (colour, "WEBP", {"quality": 70}),
        (colour, "WEBP", {"lossless": True}),
        (alpha, "WEBP", {"exif": exif}),
        (alpha, "PNG", {}),
        (colour.quantize(16), "PNG", {"transparency": 3}),
        (picture.convert("I;16"), "PNG", {}),
        (picture.convert("1"), "PNG", {}),
        (picture.convert("LA"), "PNG", {"exif": exif}),
    ]
    encoded = []
    for image, fmt, options in wanted:
        buffer = io.BytesIO()
        image.save(buffer, fmt, **options)
        encoded.append(buffer.getvalue())
    return encoded


def _flip(data: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    for _number in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _cut(data: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    return data[: rng.choice((rng.randrange(len(data)), len(data) - rng.randint(1, 12)))]


def _splice(data: bytearray, rng: random.Random, others: list[bytes]) -> bytearray:
    other = rng.choice(others)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _remove(data: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 200)]
    return data


def _repeat(data: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randint(1, 200)]
    return data[:start] + piece * rng.choice((2, 5, 50)) + data[start:]


def _header(data: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    for _number in range(rng.randint(1, 6)):
        data[rng.randrange(min(len(data), 160))] = rng.choice((*EXTREMES, rng.randrange(256)))
    return data


def _png_size(data: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    """Another size, depth or colour type under a right checksum: the header lies consistently."""
    if not data.startswith(b"\x89PNG"):
        return _header(data, rng, _)
    sizes = (0, 1, 2, 71, 200, 3000, 8000, 9000, 70_000, 2**31 - 1)
    ihdr = struct.pack(">II", rng.choice(sizes), rng.choice(sizes)) + bytes(
        [rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6)), 0, 0, rng.choice((0, 1))]
    )
    data[16:29] = ihdr
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
    return data


MUTATIONS = (_flip, _cut, _splice, _remove, _repeat, _header, _png_size)


def fuzzed_picture(number: int, sources: list[bytes]) -> bytes:
    """Picture `number` of an endless supply."""
    rng = random.Random(number)
    data = bytearray(rng.choice(sources))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if data:
            data = rng.choice(MUTATIONS)(data, rng, sources)
    return bytes(data)


# --- rows


def _random_value(rng: random.Random) -> object:
    return rng.choice(
        (
            None, True, 0, -1, 1e400, 10**40, "", "<image>", "\ud800", "\x00", "<|im_end|>", [], {},
            [[]], [None], {"from": "human"}, "a" * 5000, "https://example.org/x.png", "../x.png",
        )
    )  # fmt: skip


def _random_row(rng: random.Random) -> dict:
    turns = []
    for _ in range(rng.randint(1, 3)):
        turns += [
            {"from": "human", "value": rng.choice(WORDS)},
            {"from": "gpt", "value": rng.choice(WORDS)},
        ]
    return {"id": rng.randrange(1000), "conversations": turns}


def fuzzed_lines(number: int) -> bytes:
    """One JSONL file: good rows among others of wrong types, broken text and broken bytes."""
    rng = random.Random(number)
    lines = []
    for _ in range(rng.randint(1, 12)):
        row = _random_row(rng)
        for _ in range(rng.choice((0, 0, 1, 2))):
            place = rng.choice((row, rng.choice(row["conversations"] or [row])))
            if isinstance(place, dict) and isinstance(row.get("conversations"), list):
                key = rng.choice((*place, "image", "images", "role", "value"))
                place[key] = _random_value(rng)
            if not isinstance(row.get("conversations"), list):
                break
            if not all(isinstance(turn, dict) for turn in row["conversations"]):
                break
        line = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.8).encode(errors="replace"))
        kind = rng.randrange(9)
        if kind == 0:
            line = _flip(line, rng, [])
        elif kind == 1:
            line = line[: rng.randrange(len(line))]
        elif kind == 2:
            line = bytearray(b"[" * 100_000)
        elif kind == 3:
            line = bytearray(rng.randbytes(rng.randint(1, 60)).replace(b"\n", b""))
        elif kind == 4:
            line = bytearray(b"\xef\xbb\xbf") + line
        lines.append(bytes(line))
    return rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)


# --- the program


def _check(path: Path, rows: int) -> Counter[str]:
    """Every row in the data or in the ledger, all that is in the data decodes."""
    ledger = [json.loads(line) for line in (path / "rejects.jsonl").read_text().splitlines()]
    with Dataset.open(path) if rows > len(ledger) else _nothing() as dataset:
        stored = dataset.num_samples if dataset else 0
        keys = [row["key"] for row in ledger]
        keys += [dataset.sample_key(number)[0] for number in range(stored)]
        assert len(keys) == rows, (path, len(keys), rows)
        assert len(set(keys)) == rows, path
        for image in range(dataset.num_images if dataset else 0):
            decode_rgb(dataset.image_bytes(image), image_size=32)
    return Counter({**Counter(row["reason"] for row in ledger), "stored": stored})


class _nothing:  # noqa: N801 - stands where a dataset would
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _tokenizer(folder: Path) -> Tokenizer:
    return train_tokenizer(WORDS, vocab_size=300, path=folder / "tok.model")


def feed_images(count: int, folder: Path) -> Counter[str]:
    """Ingest `count` damaged pictures, one a row."""
    sources = originals()
    (folder / "pictures").mkdir()
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    with open(folder / "rows.jsonl", "w", encoding="ascii") as rows:
        for number in range(count):
            name = f"{number}.img"
            (folder / "pictures" / name).write_bytes(fuzzed_picture(number, sources))
            rows.write(json.dumps({"id": number, "image": name, "conversations": turns}) + "\n")
    source = llava_source(folder / "rows.jsonl", image_folder=folder / "pictures")
    ingest([source], tokenizer=_tokenizer(folder), path=folder / "x.gvd")
    assert verify_dataset(folder / "x.gvd", deep=True) == []
    return _check(folder / "x.gvd", count)


def feed_rows(count: int, folder: Path) -> Counter[str]:
    """Ingest `count` damaged JSONL files, each into a dataset of its own."""
    total: Counter[str] = Counter()
    tokenizer = _tokenizer(folder)
    for number in range(count):
        data = fuzzed_lines(number)
        (folder / "rows.jsonl").write_bytes(data)
        source = llava_source(folder / "rows.jsonl", image_folder=folder)
        ingest([source], tokenizer=tokenizer, path=folder / "x.gvd", force=number > 0)
        rows = sum(1 for line in data.split(b"\n") if line.strip())
        total += _check(folder / "x.gvd", rows)
    return total


def _main() -> None:
    kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    reasons = {"images": feed_images, "rows": feed_rows}[kind](count, folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    report = {
        "reasons": dict(sorted(reasons.items())),
        "grown_mib": grown / 1024,
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    _main()
