"""From encoded bytes to RGB pixels with Pillow: what is allowed, what is refused and why. No torch.

Pillow's `verify()` passes cut JPEGs, so validation decodes fully. `LOAD_TRUNCATED_IMAGES` is never
set: it turns the missing part grey and reports nothing.
"""

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from ghostvis_mega.data.layout import ImageFormat
from ghostvis_mega.utils.errors import DataError

MAX_PIXELS = 64 * 1024 * 1024
MAX_SIDE = 65_535
MAX_ASPECT = 200
MIN_SIDE = 2
_FORMATS = tuple(fmt.name for fmt in ImageFormat)
_STORED_AS = {name: ImageFormat[name] for name in _FORMATS} | {"MPO": ImageFormat.JPEG}
"""By Pillow's name. MPO is a JPEG that other pictures follow; the first one counts."""
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUIET_LOCK = threading.Lock()
_WHITE = (255, 255, 255, 255)
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    TypeError,
    KeyError,
)
"""What Pillow's decoders raise on damaged input; all but OSError by way of unchecked parsing."""


class ImageError(DataError):
    """An image that is refused; `reason` is the code that the ledger counts."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class ImageInfo:
    """What images.idx stores; width and height are those after the EXIF turn."""

    format: ImageFormat
    width: int
    height: int
    orientation: int
    channels: int
    bits: int


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings on odd metadata; what matters here is checked or raised.

    Filters are global to the process and restored on leaving, so two threads must not interleave.
    """
    with _QUIET_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes) -> Image.Image:
    """Parse the header and refuse what is too large before a pixel is decoded."""
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            "not_an_image", f"{len(data)} bytes that are no {', '.join(_FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except _DECODE_ERRORS as error:
        raise ImageError("broken", f"header: {error}") from error
    if image.format not in _STORED_AS:
        raise ImageError("not_an_image", f"{image.format} is none of {', '.join(_FORMATS)}")
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError("too_large", f"{width}x{height} pixels, at most {MAX_PIXELS} are decoded")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; broken EXIF is common and never a reason to lose a picture."""
    try:
        with _quiet():
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _bits(image: Image.Image) -> int:
    if image.mode.startswith("I"):
        return 16
    return 1 if image.mode == "1" else 8


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except _DECODE_ERRORS as error:
        reason = "truncated" if "truncated" in str(error).lower() else "broken"
        raise ImageError(reason, f"{image.format}: {error}") from error


def probe(data: bytes) -> ImageInfo:
    """Decode fully, to be sure that training can, and describe.

    Raises:
        ImageError: not_an_image, broken, truncated, too_large, too_small or extreme_aspect.
    """
    image = _open(data)
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            "too_small", f"{width}x{height} pixels, each side needs at least {MIN_SIDE}"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            "extreme_aspect", f"{width}x{height} pixels, sides may differ {MAX_ASPECT} times"
        )
    bits, channels = _bits(image), len(image.getbands())
    _load(image)
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    return ImageInfo(
        format=_STORED_AS[str(image.format)],
        width=width,
        height=height,
        orientation=orientation,
        channels=channels,
        bits=bits,
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 on convert; 257 maps 65535 to 255.
        grey = np.asarray(image).astype(np.int64).clip(0, 65_535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def decode_rgb(data: bytes, *, image_size: int) -> np.ndarray:
    """Decode, turn upright, put on white, resize.

    Returns:
        uint8 [image_size, image_size, 3].

    Raises:
        ImageError: the bytes are no image, damaged, or too large.
    """
    image = _open(data)
    # JPEG only: decode at 1/2, 1/4 or 1/8 if that is still no smaller than what is asked for.
    image.draft("RGB", (image_size, image_size))
    _load(image)
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    if rgb.size != (image_size, image_size):
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BICUBIC)
    if orientation != 1:
        rgb = rgb.transpose(_TURNS[orientation])
    return np.asarray(rgb)
