"""Small pictures for pages: the stored bytes if they are few, else a reduced copy."""

import io

from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.pixels import decode_rgb

LARGEST_BYTES = 48 * 1024
_SIDE = 320


def thumbnail(dataset: Dataset, image_id: int) -> bytes:
    """Encoded picture of at most a few ten kilobytes.

    Raises:
        DataError: the stored bytes are damaged.
    """
    data = dataset.image_bytes(image_id)
    record = dataset.image_index[image_id]
    width, height = int(record["width"]), int(record["height"])
    if len(data) <= LARGEST_BYTES and max(width, height) <= 4 * _SIDE:
        return data
    # The decoder gives squares, as towers want them; the sides are put right afterwards.
    scale = _SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(decode_rgb(data, image_size=_SIDE)).resize(size)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
