"""Encoded pictures inside a page, as data URIs."""

import base64

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
)


def picture_type(data: bytes) -> str:
    """Media type of an encoded picture.

    Raises:
        ValueError: neither PNG, JPEG nor WebP.
    """
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise ValueError("a picture for a page is neither PNG, JPEG nor WebP")


def data_uri(data: bytes) -> str:
    """`data:image/...;base64,...` of an encoded picture."""
    return f"data:{picture_type(data)};base64,{base64.b64encode(data).decode('ascii')}"
