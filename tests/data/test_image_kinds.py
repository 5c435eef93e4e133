"""Eighteen kinds of bad or odd pictures through `ingest`: the reason, or what is stored."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostvis_mega.data import pixels
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row
from ghostvis_mega.data.layout import ImageFormat
from ghostvis_mega.data.pixels import decode_rgb, probe
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.utils.errors import DataError

STORED = "stored"


def _encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def _noise(width: int = 64, height: int = 48) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _huge_png(side: int) -> bytes:
    """A header that promises a square of `side` pixels, and nothing after it."""
    ihdr = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def _flipped_scan(data: bytes) -> bytes:
    """64 bytes of the scan changed, none into a marker; Pillow notices nothing."""
    changed, start = bytearray(data), data.index(b"\xff\xda") + 64
    for place in range(start, start + 64 * 7, 7):
        if 0xFF not in changed[place - 1 : place + 2]:
            changed[place] = (changed[place] ^ 1) % 0xFF
    return bytes(changed)


def _transparent(mode: str) -> bytes:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 16, 32))
    return _encode(image.quantize(4) if mode == "P" else image, "PNG")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 255, 0), (0, 0, 16, 32))  # left as stored, top when upright
    return _encode(image, "JPEG", exif=exif, quality=95)


def _white_right(pixels: np.ndarray) -> bool:
    return bool((pixels[:, 20:] == 255).all() and (pixels[:, :12] < 16).all())


def _upright(pixels: np.ndarray) -> bool:
    return bool(pixels[2, 16, 1] > 200 > 60 > pixels[2, 16, 0])


def _scaled(pixels: np.ndarray) -> bool:
    expected = np.linspace(0, 255, 32)
    return bool(np.abs(pixels[4, :, 0].astype(int) - expected).max() <= 1)


def _first_of_two(pixels: np.ndarray) -> bool:
    return bool(np.array_equal(pixels, decode_rgb(JPEG, image_size=32)))


JPEG, PNG = _encode(_noise(), "JPEG"), _encode(_noise(), "PNG")
MPO = _encode(_noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
RAMP = Image.fromarray(np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1)))

KINDS: dict[str, tuple[bytes, str, Callable[[np.ndarray], bool] | None]] = {
    "zero bytes": (b"", "not_an_image", None),
    "HTML page": (b"<!DOCTYPE html><html>404</html>", "not_an_image", None),
    "format that is not allowed": (_encode(_noise(), "GIF"), "not_an_image", None),
    "JPEG cut in half": (JPEG[: len(JPEG) // 2], "truncated", None),
    "JPEG without its last two bytes": (JPEG[:-2], "truncated", None),
    "JPEG with changed scan bytes": (_flipped_scan(JPEG), STORED, None),
    "PNG with a broken chunk": (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], "broken", None),
    "PNG of 50,000 squared": (_huge_png(50_000), "too_large", None),
    "PNG of 13,000 squared": (_huge_png(13_000), "too_large", None),
    "JPEG that a second picture follows": (MPO, STORED, _first_of_two),
    "CMYK JPEG": (_encode(_noise().convert("CMYK"), "JPEG"), STORED, None),
    "EXIF orientation 6": (_turned(), STORED, _upright),
    "broken EXIF": (
        _encode(_noise(), "JPEG", exif=b"Exif\0\0MM\x00*\xff\xff\xff\xff garbage"), STORED, None,
    ),
    "16-bit grey PNG": (_encode(RAMP, "PNG"), STORED, _scaled),
    "palette with transparency": (_transparent("P"), STORED, _white_right),
    "RGBA": (_transparent("RGBA"), STORED, _white_right),
    "one pixel": (_encode(Image.new("RGB", (1, 1)), "PNG"), "too_small", None),
    "4000 by 2": (_encode(Image.new("RGB", (4000, 2)), "PNG"), "extreme_aspect", None),
}  # fmt: skip


@pytest.fixture
def path(build: Callable[..., Path], tmp_path: Path) -> Path:
    """All kinds in one dataset, each in a row that its name is the key of."""
    rows = []
    for number, (name, (data, _, _)) in enumerate(KINDS.items()):
        file = tmp_path / f"{number}.img"
        file.write_bytes(data)
        turns = (Turn("user", (ImagePart(), "q")), Turn("assistant", ("a",)))
        rows.append(Row(name, turns, (file,)))
    return build(rows)


def test_there_are_eighteen() -> None:
    assert len(KINDS) == 18


def test_each_is_refused_with_its_reason_or_stored(path: Path) -> None:
    ledger = [json.loads(line) for line in (path / "rejects.jsonl").read_text().splitlines()]
    found = {row["key"]: row["reason"] for row in ledger}
    with Dataset.open(path) as opened:
        found |= {opened.sample_key(number)[0]: STORED for number in range(opened.num_samples)}
    assert found == {name: reason for name, (_, reason, _) in KINDS.items()}


def test_what_is_stored_is_stored_as_it_came_and_decodes_right(path: Path) -> None:
    checked = 0
    with Dataset.open(path) as opened:
        for number in range(opened.num_samples):
            sample = opened.sample(number)
            data, _, right = KINDS[sample.key]
            stored = opened.image_bytes(sample.image_ids[0])
            assert stored == data
            pixels = decode_rgb(stored, image_size=32)
            assert pixels.shape == (32, 32, 3)
            if right is not None:
                assert right(pixels), sample.key
                checked += 1
            if sample.key == "EXIF orientation 6":
                record = opened.image_index[sample.image_ids[0]]
                assert (record["width"], record["height"]) == (32, 64)
    assert checked == 5


def test_what_pillow_calls_by_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(MPO).format is ImageFormat.JPEG
    monkeypatch.setattr(pixels, "_STORED_AS", {"JPEG": ImageFormat.JPEG})
    assert probe(JPEG).format is ImageFormat.JPEG
    for judge in (probe, lambda data: decode_rgb(data, image_size=8)):
        with pytest.raises(pixels.ImageError, match="not_an_image: MPO is none of JPEG"):
            judge(MPO)


def test_damage_after_ingest_is_found_though_it_decodes(path: Path) -> None:
    """What no decoder notices, the crc does."""
    with Dataset.open(path) as opened:
        number = next(
            n for n in range(opened.num_samples) if opened.sample_key(n)[0] == "CMYK JPEG"
        )
        image = opened.sample(number).image_ids[0]
        data = opened.image_bytes(image)
        offset = int(opened.image_index["offset"][image])
    tar = path / "media" / "00000.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:offset] + _flipped_scan(data) + content[offset + len(data) :])
    decode_rgb(_flipped_scan(data), image_size=32)
    with Dataset.open(path) as opened, pytest.raises(DataError, match="does not match its crc"):
        opened.image_bytes(image)
