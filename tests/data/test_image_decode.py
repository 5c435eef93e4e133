"""Every kind of picture that data holds: repaired as documented or refused with its reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ghostvis_mega.data.images import load_image
from ghostvis_mega.data.layout import ImageFormat
from ghostvis_mega.data.pixels import ImageError, decode_rgb, probe

RED, GREEN = (255, 0, 0), (0, 255, 0)


def _encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def _noise(width: int = 48, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds nothing."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("fmt", "near"), [("PNG", 0), ("WEBP", 60), ("JPEG", 60)])
def test_formats(fmt: str, near: int) -> None:
    flat = Image.new("RGB", (40, 40), (200, 30, 90))
    data = _encode(flat, fmt)
    pixels = load_image(data, image_size=24, augment_seed=None)
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    target = torch.tensor([200, 30, 90])[:, None, None]
    assert (pixels.int() - target).abs().max() <= near
    info = probe(data)
    assert (info.format, info.width, info.height, info.orientation) == (ImageFormat[fmt], 40, 40, 1)


def test_same_size_is_not_resampled() -> None:
    image = _noise(32, 32)
    found = load_image(_encode(image, "PNG"), image_size=32, augment_seed=None)
    assert np.array_equal(found.numpy(), np.asarray(image).transpose(2, 0, 1))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    data = _encode(Image.fromarray(np.tile(ramp, (64, 1))), "PNG")
    row = decode_rgb(data, image_size=64)[5, :, 0].astype(int)
    assert np.abs(row - np.linspace(0, 255, 64)).max() <= 1
    clipped = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[5, :, 0]
    assert np.count_nonzero(clipped == 255) > 50  # what the library does by itself
    assert probe(data).bits == 16


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 8, 16))
    if mode == "P":
        image = image.quantize(4)
    pixels = decode_rgb(_encode(image.convert(mode), "PNG"), image_size=16)
    assert np.abs(pixels[:, :8].astype(int) - 10).max() <= 2
    assert (pixels[:, 8:] == 255).all()


def test_other_modes_decode() -> None:
    for mode in ("1", "L", "P", "CMYK"):
        fmt = "JPEG" if mode == "CMYK" else "PNG"
        assert decode_rgb(_encode(_noise().convert(mode), fmt), image_size=16).shape == (16, 16, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turn(orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), RED)
    upright.paste(GREEN, (0, 0, 32, 16))  # top left
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(stored, "JPEG", exif=exif, quality=95)
    pixels = decode_rgb(data, image_size=32).astype(int)
    assert pixels[4, 4, 1] > 200 > 60 > pixels[4, 4, 0]
    for y, x in ((4, 27), (27, 4), (27, 27)):
        assert pixels[y, x, 0] > 200 > 60 > pixels[y, x, 1]
    info = probe(data)
    assert (info.width, info.height, info.orientation) == (64, 32, orientation)


def test_broken_exif_is_no_reason_to_lose_a_picture() -> None:
    data = _encode(_noise(), "JPEG", exif=b"Exif\0\0MM\x00*\xff\xff\xff\xff garbage")
    assert probe(data).orientation == 1
    assert decode_rgb(data, image_size=16).shape == (16, 16, 3)


JPEG, PNG = _encode(_noise(), "JPEG"), _encode(_noise(), "PNG")
BROKEN_CHUNK = PNG[:60] + bytes([PNG[60] ^ 0xFF]) + PNG[61:]


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (b"", {"not_an_image"}),
        (b"<html>404</html>", {"not_an_image"}),
        (_encode(_noise(), "GIF"), {"not_an_image"}),
        (_encode(_noise(), "BMP"), {"not_an_image"}),
        (JPEG[: len(JPEG) // 2], {"truncated"}),
        (JPEG[:-2], {"truncated"}),
        (PNG[: len(PNG) // 2], {"truncated", "broken"}),
        (BROKEN_CHUNK, {"broken"}),
        (_png_header(9_000, 9_000), {"too_large"}),
        (_png_header(50_000, 50_000), {"too_large"}),
        (_png_header(70_000, 2), {"too_large"}),
        (_encode(Image.new("RGB", (1, 1)), "PNG"), {"too_small"}),
        (_encode(Image.new("RGB", (4000, 2)), "PNG"), {"extreme_aspect"}),
    ],
    ids=[
        "empty", "html", "gif", "bmp", "half jpeg", "cut jpeg", "half png", "broken chunk",
        "large", "bomb", "wide", "one pixel", "line",
    ],
)  # fmt: skip
def test_bad_images_have_a_reason(data: bytes, reasons: set[str]) -> None:
    with pytest.raises(ImageError) as caught:
        probe(data)
    assert caught.value.reason in reasons


def test_large_pictures_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(ImageError, match="too_large"):
        decode_rgb(_png_header(13_000, 13_000), image_size=16)
    with pytest.raises(AssertionError, match="pixels were decoded"):
        decode_rgb(PNG, image_size=16)


def test_fuzzed_images_never_crash() -> None:
    """Each mutation decodes or is refused by ImageError; anything else is our bug."""
    generator = np.random.default_rng(0)
    originals = [JPEG, PNG, _encode(_noise(), "WEBP"), _encode(_noise().quantize(8), "PNG")]
    refused = 0
    for number in range(600):
        data = bytearray(originals[number % len(originals)])
        for place in generator.integers(0, len(data), generator.integers(1, 12)):
            data[place] = generator.integers(0, 256)
        try:
            probe(bytes(data))
            load_image(bytes(data), image_size=16, augment_seed=None)
        except ImageError:
            refused += 1
    assert 0 < refused < 600


def test_augmentation_is_a_function_of_its_seed() -> None:
    data = _encode(_noise(32, 32), "PNG")
    plain = load_image(data, image_size=32, augment_seed=None)
    seeds = [load_image(data, image_size=32, augment_seed=seed) for seed in range(12)]
    again = [load_image(data, image_size=32, augment_seed=seed) for seed in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(seeds, again, strict=True))
    assert len({bytes(pixels.numpy().tobytes()) for pixels in [plain, *seeds]}) > 10


def test_augmentation_only_mirrors_and_shifts() -> None:
    """The middle of the picture survives somewhere, mirrored at most and never upside down."""
    picture = np.asarray(_noise(32, 32)).transpose(2, 0, 1)
    data = _encode(_noise(32, 32), "PNG")
    for seed in range(8):
        found = load_image(data, image_size=32, augment_seed=seed).numpy()
        candidates = [
            np.roll(flipped, (dy, dx), axis=(1, 2))[:, 4:28, 4:28]
            for flipped in (picture, picture[:, :, ::-1])
            for dy in range(-4, 5)
            for dx in range(-4, 5)
        ]
        assert any(np.array_equal(found[:, 4:28, 4:28], c) for c in candidates)
