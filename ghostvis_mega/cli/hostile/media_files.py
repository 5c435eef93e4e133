"""Pictures and tars that are bombs, lies, or of formats that nobody asked for."""

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from ghostvis_mega.cli.hostile.case import Case, Kit, put


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes = b"", *between: bytes) -> bytes:
    """A one-bit PNG with compressed `rows` as its pixels."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    tail = _chunk(b"IDAT", rows or zlib.compress(b"\0")) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + tail


def _zeros(count: int) -> bytes:
    """So many zero bytes, compressed without ever being whole in memory."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(min(1 << 20, count - at))) for at in range(0, count, 1 << 20)]
    return b"".join(parts) + packer.flush()


def _jpeg(kit: Kit, *, cut: float = 1.0, size: tuple[int, int] | None = None) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(kit.picture)) as image, io.BytesIO() as file:
        image.convert("RGB").resize((64, 64)).save(file, "JPEG")
        data = file.getvalue()
    if size is not None:
        # The sides stand behind the marker of the baseline frame, its length and its precision.
        place = data.index(b"\xff\xc0") + 5
        data = data[:place] + struct.pack(">HH", *size) + data[place + 4 :]
    return data[: int(len(data) * cut)]


def _gif(frames: int) -> bytes:
    frame = b",\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    return b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


def _fits() -> bytes:
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8",
             "NAXIS   =                    2", "NAXIS1  =                50000",
             "NAXIS2  =                50000", "END"]  # fmt: skip
    return "".join(card.ljust(80) for card in cards).encode().ljust(2880) + bytes(2880)


def _webp(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


PICTURES: dict[str, Callable[[Kit], bytes]] = {
    "PNG of 50,000 x 50,000 pixels": lambda kit: png(50_000, 50_000, _zeros(50_000 * 6_251)),
    "PNG of 2^31 - 1 pixels a side": lambda kit: png((1 << 31) - 1, (1 << 31) - 1),
    "PNG without width": lambda kit: png(0, 64),
    "PNG of 65,000 x 1": lambda kit: png(65_000, 1, zlib.compress(bytes(8_126))),
    "PNG with a text that unfolds": lambda kit: png(
        64, 64, b"", _chunk(b"zTXt", b"a\0\0" + _zeros(1 << 30))
    ),
    "PNG with a profile that unfolds": lambda kit: png(
        64, 64, b"", _chunk(b"iCCP", b"a\0\0" + _zeros(1 << 30))
    ),
    "PNG without its pixels": lambda kit: png(4096, 4096),
    "JPEG cut in half": lambda kit: _jpeg(kit, cut=0.5),
    "JPEG that says 65,500 x 65,500": lambda kit: _jpeg(kit, size=(65_500, 65_500)),
    "WebP that says 16,383 x 16,383": lambda kit: _webp(16_383, 16_383),
    "GIF of 100,000 frames": lambda kit: _gif(100_000),
    "FITS": lambda kit: _fits(),
    "GD": lambda kit: b"\xff\xfe" + struct.pack(">HHB", 60_000, 60_000, 1) + bytes(5000),
    "EPS with a command": lambda kit: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
        + f"(%pipe%{kit.command}) (w) file\n".encode()
    ),
    "SVG with an outside entity": lambda kit: (
        f'<!DOCTYPE s [<!ENTITY x SYSTEM "file://{kit.secret}">]>'.encode()
        + b"<svg><text>&x;</text></svg>"
    ),
    "TIFF": lambda kit: (
        b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 256, 4, 1, 1 << 31) + bytes(8)
    ),
    "ICO": lambda kit: b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + struct.pack("<II", 1 << 31, 22),
    "PSD": lambda kit: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 300_000, 300_000, 8, 3),
    "PDF": lambda kit: b"%PDF-1.7\n1 0 obj << /OpenAction << /S /Launch >> >> endobj\n",
    "a pickle": lambda kit: kit.pickle,
    "nothing": lambda kit: b"",
}
ONLY_HEADERS = ("JPEG that says 65,500 x 65,500", "PNG of 50,000 x 50,000 pixels")


def _picture(name: str, data: Callable[[Kit], bytes]) -> list[Case]:
    def make(kit: Kit, folder: Path) -> Path:
        return put(folder / "picture", data(kit))

    cases = [Case(f"picture: {name}", "picture", make)]
    if name in ONLY_HEADERS:
        cases.append(Case(f"picture in training: {name}", "picture_again", make))
    return cases


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _tar(name: str, *members: Callable[[Kit], tuple[tarfile.TarInfo, bytes]]) -> Case:
    def make(kit: Kit, folder: Path) -> Path:
        path = folder / "webdataset" / "a.tar"
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w") as tar:
            for member in members:
                info, data = member(kit)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return Case(f"tar: {name}", "rows", make)


def _escape(name: str) -> Case:
    return _tar(
        f"the name {name}",
        lambda kit: (_member(f"{name}.png"), kit.picture),
        lambda kit: (_member(f"{name}.txt"), b"caption"),
    )


def _special(what: str, kind: bytes, link: str = "") -> Case:
    return _tar(
        what,
        lambda kit: (_member("a.png", kind, link or str(kit.secret)), b""),
        lambda kit: (_member("a.txt", kind, link or str(kit.secret)), b""),
    )


def _raw_tar(name: str, data: Callable[[Kit], bytes]) -> Case:
    return Case(
        f"tar: {name}",
        "rows",
        lambda kit, folder: put(folder / "webdataset" / "a.tar", data(kit)),
    )


def _lying(size: str) -> bytes:
    """A header whose size field says what it likes."""
    header = bytearray(_member("a.png").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = bytes.fromhex(size) if len(size) == 24 else size.encode().ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + bytes(1024)


TARS = [
    _escape("../escape"),
    _escape("/tmp/ghostvis-escape"),
    _escape("a/../../escape"),
    _special("symbolic links", tarfile.SYMTYPE),
    _special("hard links", tarfile.LNKTYPE),
    _special("links that go up", tarfile.SYMTYPE, "../../../../etc/passwd"),
    _special("character devices", tarfile.CHRTYPE),
    _special("block devices", tarfile.BLKTYPE),
    _special("pipes", tarfile.FIFOTYPE),
    _special("sparse files", tarfile.GNUTYPE_SPARSE),
    _tar("pickled parts", lambda kit: (_member("a.pyd"), kit.pickle),
         lambda kit: (_member("a.pth"), kit.pickle)),
    _tar("an address instead of a picture", lambda kit: (
        _member("a.json"),
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
        b'"http://127.0.0.1:9/a.png"}]}]}')),
    _tar("deep JSON", lambda kit: (_member("a.json"), b"[" * 200_000)),
    _raw_tar("a size of 8 EiB", lambda kit: _lying("800000007fffffffffffffff")),
    _raw_tar("a size below zero", lambda kit: _lying("ffffffffffffffffffffffff")),
    _raw_tar("a size that is no number", lambda kit: _lying("zzzzzzzzzzz")),
    _raw_tar("gzip of a gigabyte", lambda kit: gzip.compress(b"") + _gzip_bomb()),
    _raw_tar("a pickle", lambda kit: kit.pickle),
]  # fmt: skip


def _gzip_bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024)) + packer.flush()


MEDIA_CASES = [
    *(case for name, data in PICTURES.items() for case in _picture(name, data)),
    *TARS,
]
