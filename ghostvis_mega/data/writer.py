"""Writes one dataset, front to back, into a temporary directory that is renamed at the end.

The result depends on the rows alone: no times, hosts or random names get into a file.
"""

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ghostvis_mega.data import manifest as names
from ghostvis_mega.data.layout import (
    IMAGE_RECORD,
    IMAGE_REF,
    KEY_HEADER,
    SAMPLE_CRC_OFFSET,
    SAMPLE_RECORD,
    shard_name,
    token_dtype,
)
from ghostvis_mega.data.leftovers import clear_leftovers
from ghostvis_mega.data.linked import LinkedFile, link_media
from ghostvis_mega.data.manifest import Manifest, read_manifest, write_manifest
from ghostvis_mega.data.pixels import ImageInfo
from ghostvis_mega.data.template import TEMPLATE_NAME, Encoded
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import (
    HashingFile,
    atomic_write_json,
    fsync_directory,
    temporary_name,
)

SHARD_BYTES = 512 * 1024 * 1024
PROGRESS_FILE = "progress.json"
_BLOCK = tarfile.BLOCKSIZE
_SAMPLE_FILES = (
    names.TOKENS,
    names.SAMPLE_INDEX,
    names.IMAGE_REFS,
    names.SPANS,
    names.KEYS,
    names.ANSWERS,
    names.REJECTS,
    names.MEDIA_INDEX,
)


def content_hash(data: bytes) -> bytes:
    """blake2b-128: the identity of an image."""
    return hashlib.blake2b(data, digest_size=16).digest()


class DatasetWriter:
    """Context manager; leaving it without an error publishes the dataset at `path`."""

    def __init__(
        self,
        path: Path,
        *,
        tokenizer: Tokenizer,
        sources: Sequence[dict[str, str]],
        force: bool,
        template: str = TEMPLATE_NAME,
        work: Path | None = None,
        media: Path | None = None,
    ):
        """Begin a dataset, or go on with the one in `work`.

        Args:
            force: replace a dataset that is at `path`.
            work: directory of an interruptible build: `checkpoint` may be called, an error leaves
                the files for the next run, and the end leaves a whole dataset in `work/data`.
            media: a dataset whose pictures become those of the new one, all of them with their
                numbers; no other is added.

        Raises:
            DataError: `path` is taken.
        """
        self._path = path
        if work is None:
            clear_leftovers(path)
        check_target(path, force=force)
        self._tokenizer = tokenizer
        self._template = template
        self._sources = [dict(source) for source in sources]
        self._rows: Counter[int] = Counter()
        self._rejected: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self._dtype = token_dtype(tokenizer.vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._work = work
        self._directory = temporary_name(path) if work is None else work / "data"
        self._files: dict[str, HashingFile | LinkedFile] = {}
        self._image_ids: dict[bytes, int] = {}
        self._linked_images = 0
        self._shard = -1
        self._shard_offsets: list[int] = []
        self._tokens = self._refs = self._spans = self._samples = self._trained = 0
        self.rows_done = 0
        if work is not None and (work / PROGRESS_FILE).is_file():
            self._resume(work / PROGRESS_FILE)
            return
        if self._directory.exists():
            shutil.rmtree(self._directory)
        for part in ("media", "samples"):
            (self._directory / part).mkdir(parents=True)
        if media is not None:
            self._files = link_media(media, self._directory)
            self._linked_images = read_manifest(media).counts.images
        self._files |= {
            name: HashingFile(self._directory / name)
            for name in _SAMPLE_FILES
            if name not in self._files
        }

    # --- rows

    def image_id(self, data: bytes) -> int | None:
        """Id of an image that is stored already."""
        return self._image_ids.get(content_hash(data))

    def add_image(self, data: bytes, info: ImageInfo) -> int:
        """Store encoded bytes once and return their id."""
        digest = content_hash(data)
        if (known := self._image_ids.get(digest)) is not None:
            return known
        image_id = len(self._image_ids)
        record = np.zeros((), dtype=IMAGE_RECORD)
        record["offset"] = self._append_to_tar(f"{image_id:08d}.{info.format.extension}", data)
        record["shard"] = self._shard
        record["format"], record["mode"] = info.format, info.bits
        record["size"], record["crc32"] = len(data), zlib.crc32(data)
        record["width"], record["height"] = info.width, info.height
        record["orientation"], record["channels"] = info.orientation, info.channels
        record["blake2b"] = np.void(digest)
        self._files[names.MEDIA_INDEX].write(record.tobytes())
        self._image_ids[digest] = image_id
        return image_id

    def add_sample(
        self,
        encoded: Encoded,
        *,
        key: str,
        answers: Sequence[str],
        image_ids: Sequence[int],
        source: int,
    ) -> None:
        """Store one conversation; image ids in reading order."""
        refs = np.zeros(len(image_ids), dtype=IMAGE_REF)
        refs["image_id"], refs["pos"] = image_ids, encoded.image_positions
        parts = {
            names.TOKENS: encoded.tokens.astype(self._dtype).tobytes(),
            names.IMAGE_REFS: refs.tobytes(),
            names.SPANS: encoded.spans.tobytes(),
        }
        trained = int(encoded.trained_mask[1:].sum())
        record = np.zeros((), dtype=SAMPLE_RECORD)
        record["tok_off"], record["tok_len"] = self._tokens, len(encoded.tokens)
        record["img_off"], record["n_images"] = self._refs, len(refs)
        record["span_off"], record["n_spans"] = self._spans, len(encoded.spans)
        record["source"], record["trained_len"] = source, trained
        text = hashlib.blake2b(
            parts[names.TOKENS] + parts[names.IMAGE_REFS], digest_size=8
        ).digest()
        record["text_hash"] = int.from_bytes(text, "little")
        record["key_off"] = self._files[names.KEYS].size_bytes
        crc = zlib.crc32(record.tobytes()[:SAMPLE_CRC_OFFSET])
        for data in parts.values():
            crc = zlib.crc32(data, crc)
        record["crc32"] = crc
        for name, data in parts.items():
            self._files[name].write(data)
        self._write_key(key, answers)
        self._files[names.SAMPLE_INDEX].write(record.tobytes())
        self._tokens += len(encoded.tokens)
        self._refs += len(refs)
        self._spans += len(encoded.spans)
        self._samples += 1
        self._trained += trained
        self._rows[source] += 1

    def reject(self, *, key: str, source: int, reason: str, detail: str) -> None:
        """Write one dropped row to the ledger."""
        row = {
            "key": key,
            "source": self._sources[source]["name"],
            "reason": reason,
            "detail": detail,
        }
        # ASCII: keys and details may hold lone surrogates, which have no UTF-8 form.
        self._files[names.REJECTS].write((json.dumps(row, sort_keys=True) + "\n").encode("ascii"))
        self.reasons[reason] += 1
        self._rows[source] += 1
        self._rejected[source] += 1

    def end_row(self) -> None:
        """Called after each row of a source, when all of it is stored or in the ledger."""
        self.rows_done += 1

    def _write_key(self, key: str, answers: Sequence[str]) -> None:
        key_bytes = key.encode()
        answer_bytes = json.dumps(list(answers), ensure_ascii=False).encode()
        header = np.zeros((), dtype=KEY_HEADER)
        header["key_len"], header["answers_len"] = len(key_bytes), len(answer_bytes)
        header["answers_off"] = self._files[names.ANSWERS].size_bytes
        header["crc32"] = zlib.crc32(answer_bytes, zlib.crc32(key_bytes))
        self._files[names.KEYS].write(header.tobytes() + key_bytes)
        self._files[names.ANSWERS].write(answer_bytes)

    # --- media

    def _append_to_tar(self, member: str, data: bytes) -> int:
        """Write one USTAR member and return the offset of its data."""
        if (
            self._shard < 0
            or self._files[shard_name(self._shard)].size_bytes + len(data) > SHARD_BYTES
        ):
            self._close_shard()
            self._shard += 1
            self._files[shard_name(self._shard)] = HashingFile(
                self._directory / shard_name(self._shard)
            )
            self._shard_offsets = []
        tar = self._files[shard_name(self._shard)]
        header = tarfile.TarInfo(member)
        header.size, header.mode, header.mtime = len(data), 0o644, 0
        self._shard_offsets.append(tar.size_bytes)
        tar.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = tar.size_bytes
        tar.write(data)
        tar.write(bytes(-len(data) % _BLOCK))
        return offset

    def _close_shard(self) -> None:
        """End the tar and write its index: u64 offsets of the members and of their end."""
        if self._shard < 0:
            return
        name = shard_name(self._shard)
        offsets = np.array([*self._shard_offsets, self._files[name].size_bytes], dtype="<u8")
        self._files[name].write(bytes(2 * _BLOCK))
        self._write_whole(f"{name}.idx", offsets.tobytes())

    def _write_whole(self, name: str, data: bytes) -> None:
        self._files[name] = HashingFile(self._directory / name)
        self._files[name].write(data)

    # --- interruption

    def checkpoint(self) -> None:
        """Make all rows so far survive a kill or a power cut; only with `work`."""
        if self._work is None:
            raise ValueError("checkpoint() needs a writer with `work`")
        for file in self._files.values():
            file.sync()
        atomic_write_json(
            self._work / PROGRESS_FILE,
            {
                "files": {name: file.size_bytes for name, file in self._files.items()},
                "rows": {str(source): count for source, count in self._rows.items()},
                "rejected": {str(source): count for source, count in self._rejected.items()},
                "reasons": dict(self.reasons),
                "shard": self._shard,
                "tokens": self._tokens,
                "refs": self._refs,
                "spans": self._spans,
                "samples": self._samples,
                "trained": self._trained,
                "rows_done": self.rows_done,
            },
        )

    def _resume(self, progress: Path) -> None:
        """Cut every file back to the last checkpoint and read what a writer remembers."""
        state = json.loads(progress.read_bytes())
        for file in sorted(self._directory.rglob("*")):
            if (
                file.is_file()
                and file.relative_to(self._directory).as_posix() not in state["files"]
            ):
                file.unlink()
        self._files = {
            name: HashingFile.resume(self._directory / name, size=size)
            for name, size in state["files"].items()
        }
        self._rows.update({int(source): count for source, count in state["rows"].items()})
        self._rejected.update({int(source): count for source, count in state["rejected"].items()})
        self.reasons.update(state["reasons"])
        self._shard, self.rows_done = state["shard"], state["rows_done"]
        self._tokens, self._refs, self._spans = state["tokens"], state["refs"], state["spans"]
        self._samples, self._trained = state["samples"], state["trained"]
        records = np.fromfile(self._directory / names.MEDIA_INDEX, dtype=IMAGE_RECORD)
        self._image_ids = {
            record.tobytes(): number for number, record in enumerate(records["blake2b"])
        }
        last = records[records["shard"] == max(self._shard, 0)]
        # An offset in a record is that of the data, behind the member's header.
        self._shard_offsets = (last["offset"].astype(np.int64) - _BLOCK).tolist()

    # --- end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            for file in self._files.values():
                file.discard()
            if self._work is None:
                shutil.rmtree(self._directory)
            return
        self._finish()

    def _finish(self) -> None:
        self._close_shard()
        self._write_whole(self._tokenizer.file_name, self._tokenizer.path.read_bytes())
        for file in self._files.values():
            file.close()
        for part in ("media", "samples"):
            fsync_directory(self._directory / part)
        write_manifest(self._directory, self._document())
        if self._work is None:
            publish(self._directory, self._path)

    def _document(self) -> dict[str, Any]:
        sources = [
            {**source, "rows": self._rows[number], "rejected": self._rejected[number]}
            for number, source in enumerate(self._sources)
        ]
        files = {
            name: {"bytes": file.size_bytes, "sha256": file.sha256}
            for name, file in self._files.items()
        }
        return {
            "tool": "ghostvis_mega.data",
            "counts": {
                "samples": self._samples,
                "images": self._linked_images or len(self._image_ids),
                "tokens": self._tokens,
                "trained_tokens": self._trained,
                "rejected": self._rejected.total(),
            },
            "tokenizer": self._tokenizer.info(file=self._tokenizer.file_name).model_dump(),
            "template": {"name": self._template},
            "sources": sources,
            "files": files,
        }


def check_target(path: Path, *, force: bool) -> None:
    """Refuse to replace anything but a prepared dataset, and that only with `force`."""
    if not path.exists():
        return
    if not force:
        raise DataError(f"{path} exists already: give another name, or --force to replace it")
    if not (path / names.MANIFEST_FILE).is_file():
        raise DataError(
            f"{path} is not a prepared dataset, so --force does not replace it: remove it yourself"
        )


def publish(temporary: Path, path: Path) -> Manifest:
    """Rename a whole dataset into place; an old one is moved aside first and deleted last."""
    old = None
    if path.exists():
        old = temporary.with_name(temporary.name + "-old")
        os.replace(path, old)
    os.replace(temporary, path)
    fsync_directory(path.parent)
    if old is not None:
        shutil.rmtree(old)
    return read_manifest(path)
