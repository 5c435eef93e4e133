"""Prepared datasets of random tokens, written as whole arrays: a million samples in seconds.

For timings and for tests of order and resume, where the content does not matter but every record,
reference and crc must be right.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ghostvis_mega.data import manifest as names
from ghostvis_mega.data.layout import (
    IMAGE_RECORD,
    IMAGE_REF,
    KEY_HEADER,
    SAMPLE_CRC_OFFSET,
    SAMPLE_RECORD,
    SPAN,
    ImageFormat,
    Role,
    shard_name,
    token_dtype,
)
from ghostvis_mega.data.manifest import RECORD_BYTES, Manifest, write_manifest
from ghostvis_mega.data.order import hash_u64

SPECIALS = {"pad": 0, "im_start": 1, "im_end": 2, "image": 3}
_TOKENIZER_FILE = "tokenizer.model"
_LENGTHS_KEY, _TOKENS_KEY = 11, 12


def mixed_text_lengths(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Text lengths of the GhostVis mix, and which samples have a picture: 80 % short questions
    about a picture, 20 % longer chat; both log-normal.

    Returns:
        int64 [count] tokens without the image's sentinel, bool [count].
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    pictured = hash_u64(np.arange(count), seed, _LENGTHS_KEY) % np.uint64(5) != 0
    short = np.clip(generator.lognormal(4.6, 0.55, count), 16, 1200)
    long = np.clip(generator.lognormal(5.9, 0.8, count), 32, 3900)
    return np.where(pictured, short, long).astype(np.int64), pictured


def write_synthetic(
    path: Path,
    *,
    text_lengths: np.ndarray,
    image_of: np.ndarray,
    pictures: Sequence[tuple[bytes, int, int]] = (),
    vocab_size: int = 32_000,
    seed: int = 0,
    tokenizer: bytes = b"synthetic",
    train_all: bool = False,
) -> Manifest:
    """Write a dataset at `path`, which must not exist.

    Args:
        text_lengths: int64 [samples], at least 4: tokens beside the image's sentinel.
        image_of: int64 [samples]: number of the sample's picture, or -1.
        pictures: JPEG bytes, width and height of each.
        tokenizer: content of the tokenizer file; no tokenizer can be loaded from it.
        train_all: train every token but a sample's first, as in pretraining; else its last third.
    """
    for part in ("media", "samples"):
        (path / part).mkdir(parents=True)
    records, tokens, refs, spans = _samples(
        text_lengths, image_of, vocab_size, seed, train_all=train_all
    )
    keys = np.zeros(len(records), dtype=KEY_HEADER)
    keys["answers_len"], keys["answers_off"] = 2, 0
    keys["crc32"] = zlib.crc32(b"[]")
    contents = {
        names.SAMPLE_INDEX: records.tobytes(),
        names.TOKENS: tokens.tobytes(),
        names.IMAGE_REFS: refs.tobytes(),
        names.SPANS: spans.tobytes(),
        names.KEYS: keys.tobytes(),
        names.ANSWERS: b"[]",
        names.REJECTS: b"",
        _TOKENIZER_FILE: tokenizer,
        **_media(pictures),
    }
    for name, data in contents.items():
        (path / name).write_bytes(data)
    return write_manifest(
        path,
        {
            "tool": "ghostvis_mega.perf",
            "counts": {
                "samples": len(records),
                "images": len(pictures),
                "tokens": len(tokens),
                "trained_tokens": int(records["trained_len"].sum()),
                "rejected": 0,
            },
            "tokenizer": {
                "kind": "sentencepiece",
                "file": _TOKENIZER_FILE,
                "sha256": hashlib.sha256(tokenizer).hexdigest(),
                "vocab_size": vocab_size,
                "specials": SPECIALS,
            },
            "template": {"name": "chatml"},
            "sources": [{"name": "synthetic", "rows": len(records), "rejected": 0}],
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in contents.items()
            },
        },
    )


def _samples(
    text_lengths: np.ndarray, image_of: np.ndarray, vocab_size: int, seed: int, *, train_all: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Records with right crcs, tokens, image references (at the start of a sample) and spans."""
    has_image = image_of >= 0
    lengths = text_lengths + has_image
    records = np.zeros(len(lengths), dtype=SAMPLE_RECORD)
    records["tok_len"], records["tok_off"] = lengths, np.cumsum(lengths) - lengths
    records["n_images"], records["img_off"] = has_image, np.cumsum(has_image) - has_image
    records["n_spans"], records["span_off"] = 2, 2 * np.arange(len(lengths))
    records["key_off"] = KEY_HEADER.itemsize * np.arange(len(lengths))
    # The rest is the answer, which is trained.
    asked = np.ones_like(lengths) if train_all else lengths * 2 // 3
    records["trained_len"] = lengths - asked
    noise = hash_u64(np.arange(int(lengths.sum())), seed, _TOKENS_KEY)
    tokens = noise % np.uint64(vocab_size - len(SPECIALS)) + np.uint64(len(SPECIALS))
    tokens = tokens.astype(token_dtype(vocab_size))
    tokens[records["tok_off"][has_image].astype(np.int64)] = SPECIALS["image"]
    refs = np.zeros(int(has_image.sum()), dtype=IMAGE_REF)
    refs["image_id"] = image_of[has_image]
    spans = np.zeros(2 * len(lengths), dtype=SPAN)
    spans["role"][0::2], spans["role"][1::2] = Role.USER, Role.ASSISTANT
    spans["len"][0::2], spans["len"][1::2] = asked, lengths - asked
    spans["start"][1::2], spans["train"][1::2] = asked, 1
    records["crc32"] = _crcs(records, tokens, refs, spans)
    return records, tokens, refs, spans


def _crcs(
    records: np.ndarray, tokens: np.ndarray, refs: np.ndarray, spans: np.ndarray
) -> np.ndarray:
    table, words, places, turns = (
        memoryview(array.view("u1")) for array in (records, tokens, refs, spans)
    )
    width, crcs = tokens.dtype.itemsize, np.zeros(len(records), dtype=np.uint32)
    columns = [records[field].tolist() for field in ("tok_off", "tok_len", "img_off", "n_images")]
    for index, (t, tn, r, rn) in enumerate(zip(*columns, strict=True)):
        crc = zlib.crc32(table[index * RECORD_BYTES : index * RECORD_BYTES + SAMPLE_CRC_OFFSET])
        crc = zlib.crc32(words[t * width : (t + tn) * width], crc)
        crc = zlib.crc32(places[r * IMAGE_REF.itemsize : (r + rn) * IMAGE_REF.itemsize], crc)
        crc = zlib.crc32(turns[2 * index * SPAN.itemsize : 2 * (index + 1) * SPAN.itemsize], crc)
        crcs[index] = crc
    return crcs


def _media(pictures: Sequence[tuple[bytes, int, int]]) -> dict[str, bytes]:
    """One tar with its index, and the table of images."""
    records = np.zeros(len(pictures), dtype=IMAGE_RECORD)
    records["format"], records["mode"] = ImageFormat.JPEG, 8
    records["channels"], records["orientation"] = 3, 1
    parts, offset, starts = [], 0, []
    for number, (data, width, height) in enumerate(pictures):
        header = tarfile.TarInfo(f"{number:08d}.jpg")
        header.size, header.mode = len(data), 0o644
        starts.append(offset)
        parts += [header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
        record = records[number]
        record["offset"], record["size"] = offset + tarfile.BLOCKSIZE, len(data)
        record["width"], record["height"] = width, height
        record["crc32"] = zlib.crc32(data)
        record["blake2b"] = np.void(hashlib.blake2b(data, digest_size=16).digest())
        offset += sum(len(part) for part in parts[-3:])
    contents = {names.MEDIA_INDEX: records.tobytes()}
    if pictures:
        tar = b"".join([*parts, bytes(2 * tarfile.BLOCKSIZE)])
        contents[shard_name(0)] = tar
        contents[f"{shard_name(0)}.idx"] = np.array([*starts, offset], dtype="<u8").tobytes()
    return contents
