"""Records of the gvd format, version 1: little endian, fixed size, read by mmap, never pickled."""

from enum import IntEnum

import numpy as np

from ghostvis_mega.data.manifest import RECORD_BYTES

IMAGE_RECORD = np.dtype(
    [
        ("shard", "<u4"),  # media/{shard:05d}.tar
        ("flags", "<u2"),
        ("format", "u1"),  # ImageFormat
        ("mode", "u1"),  # bits a channel as stored
        ("offset", "<u8"),  # of the encoded bytes, in the tar
        ("size", "<u4"),
        ("width", "<u2"),  # after the EXIF turn
        ("height", "<u2"),
        ("orientation", "u1"),  # EXIF, 1 to 8
        ("channels", "u1"),
        ("reserved_0", "<u2"),
        ("crc32", "<u4"),
        ("blake2b", "V16"),  # blake2b-128 of the encoded bytes: the identity of the image
        ("dhash", "<u8"),  # reserved, 0
        ("reserved_1", "<u8"),
    ]
)

SAMPLE_RECORD = np.dtype(
    [
        ("tok_off", "<u8"),  # in tokens, not bytes
        ("tok_len", "<u4"),
        ("n_images", "<u2"),
        ("n_spans", "<u2"),
        ("img_off", "<u8"),  # in records of images.ref
        ("span_off", "<u8"),  # in records of spans.bin
        ("source", "<u2"),  # place in the manifest's sources
        ("task", "<u2"),
        ("flags", "<u4"),
        ("text_hash", "<u8"),  # blake2b-64 of tokens and image identities
        ("key_off", "<u8"),  # in bytes of keys.bin
        ("trained_len", "<u4"),  # tokens under the loss
        ("crc32", "<u4"),  # of the record before this field, then tokens, image refs, spans
    ]
)

SAMPLE_CRC_OFFSET = RECORD_BYTES - 4
"""Bytes of a sample record that its crc covers."""

IMAGE_REF = np.dtype([("image_id", "<u4"), ("pos", "<u4"), ("policy", "<u4")])
"""`pos`: token position of the sentinel in the sample; `policy`: 0 is the dataset's default."""

SPAN = np.dtype(
    [("start", "<u4"), ("len", "<u4"), ("role", "u1"), ("train", "u1"), ("turn", "<u2")]
)
"""Content of one turn, or its end token; headers and line ends of the template have no span."""

KEY_HEADER = np.dtype(
    [("key_len", "<u4"), ("answers_len", "<u4"), ("answers_off", "<u8"), ("crc32", "<u4")]
)
"""Stands before each UTF-8 key in keys.bin; crc32 covers the key and its answers (a JSON list)."""

assert IMAGE_RECORD.itemsize == SAMPLE_RECORD.itemsize == RECORD_BYTES
assert IMAGE_REF.itemsize == SPAN.itemsize == 12


class Role(IntEnum):
    """What the tokens of a span are; the values are part of the format."""

    SYSTEM = 0
    USER = 1
    ASSISTANT = 2
    TOOL = 3
    IMAGE = 4
    EOS = 5
    TEXT = 6


class ImageFormat(IntEnum):
    """Encodings that are stored; the values are part of the format."""

    JPEG = 1
    PNG = 2
    WEBP = 3

    @property
    def extension(self) -> str:
        """File name ending inside the tar."""
        return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[self.name]


def token_dtype(vocab_size: int) -> np.dtype:
    """Narrowest unsigned type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shard_name(shard: int) -> str:
    """Tar of shard number `shard`, relative to the dataset."""
    return f"media/{shard:05d}.tar"
