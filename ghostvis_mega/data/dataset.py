"""An opened dataset: mmap of a few arrays, images by pread; every read checks its crc.

Opening reads no content, so a million samples open in milliseconds.
"""

import json
import mmap
import os
import threading
import zlib
from dataclasses import dataclass
from functools import cached_property
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
    Role,
    shard_name,
    token_dtype,
)
from ghostvis_mega.data.manifest import RECORD_BYTES, Manifest, find_problems, read_manifest
from ghostvis_mega.data.template import find_style
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.closing import Closing
from ghostvis_mega.utils.errors import DataError

_ADVICE = "run `python -m tools.preprocess verify` and copy or ingest the dataset again"


@dataclass(frozen=True)
class Sample:
    """One conversation as stored.

    `tokens` is int32 with one <|image|> an image; `spans` has the fields start, len, role (a
    `Role`), train and turn.
    """

    tokens: np.ndarray
    spans: np.ndarray
    image_ids: tuple[int, ...]
    image_positions: tuple[int, ...]
    key: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Gathered:
    """Several samples end to end, unexpanded; positions count from the first sample's start."""

    tokens: np.ndarray  # int64 [sum of tok_lens]
    trained: np.ndarray  # bool, like tokens
    tok_lens: np.ndarray  # int64 [samples]
    image_counts: np.ndarray  # int64 [samples]
    image_ids: np.ndarray  # int64 [images]
    image_positions: np.ndarray  # int64 [images]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of several slices, joined: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


class Dataset(Closing):
    """Read access to one `NAME.gvd`."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._samples = self._array(names.SAMPLE_INDEX, SAMPLE_RECORD)
        self._images = self._array(names.MEDIA_INDEX, IMAGE_RECORD)
        self._tokens = self._array(names.TOKENS, token_dtype(manifest.tokenizer.vocab_size))
        self._refs = self._array(names.IMAGE_REFS, IMAGE_REF)
        self._spans = self._array(names.SPANS, SPAN)
        self._keys = self._array(names.KEYS, np.dtype("u1"))
        self._answers = self._array(names.ANSWERS, np.dtype("u1"))
        arrays = (self._samples, self._tokens, self._refs, self._spans)
        self._bytes = tuple(memoryview(array.view("u1")) for array in arrays)
        self._shards: dict[str, int] = {}
        self._shards_lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> "Dataset":
        """Open a directory; DataError with all problems that `find_problems` sees."""
        path = Path(path)
        if problems := find_problems(path, what="dataset"):
            raise DataError("\n".join(problems))
        return cls(path, read_manifest(path))

    def _array(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Read-only view of a whole file."""
        path = self.path / name
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise DataError(
                f"{path} has {size} bytes, not a multiple of the record size {dtype.itemsize}"
            )
        if size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype=dtype)

    @property
    def num_samples(self) -> int:
        """Stored conversations."""
        return len(self._samples)

    @property
    def num_images(self) -> int:
        """Distinct stored images."""
        return len(self._images)

    @property
    def sample_index(self) -> np.ndarray:
        """All sample records (`layout.SAMPLE_RECORD`)."""
        return self._samples

    @property
    def image_index(self) -> np.ndarray:
        """All image records (`layout.IMAGE_RECORD`)."""
        return self._images

    @property
    def image_refs(self) -> np.ndarray:
        """All image references (`layout.IMAGE_REF`), sample after sample."""
        return self._refs

    @property
    def spans(self) -> np.ndarray:
        """All spans (`layout.SPAN`), sample after sample."""
        return self._spans

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, from the copy inside the dataset."""
        info = self.manifest.tokenizer
        pieces = find_style(self.manifest.template.name).pieces
        return Tokenizer.load(self.path / info.file, pieces=pieces, info=info)

    # --- samples

    def sample(self, index: int) -> Sample:
        """One conversation.

        Raises:
            IndexError: `index` is not in range(num_samples).
            DataError: the stored bytes do not match their crc.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples} in {self.path}")
        gathered = self.gather(np.array([index]))
        record = self._samples[index]
        start = int(record["span_off"])
        key, answers = self.sample_key(index)
        return Sample(
            tokens=gathered.tokens.astype(np.int32),
            spans=self._spans[start : start + int(record["n_spans"])],
            image_ids=tuple(gathered.image_ids.tolist()),
            image_positions=tuple(gathered.image_positions.tolist()),
            key=key,
            answers=answers,
        )

    def prompt(self, index: int) -> tuple[np.ndarray, tuple[int, ...], str, str]:
        """What a model is asked in sample `index`: all that stands before the last answer.

        Returns:
            int32 tokens up to and including the header of the last assistant turn, the image ids
            among them, the reference answer, and the text of the last question. A document has no
            questions: its first half is asked, and its second half is the answer.
        """
        sample = self.sample(index)
        roles = sample.spans["role"]
        if Role.ASSISTANT not in roles:
            half = max(1, len(sample.tokens) // 2)
            asked, rest = sample.tokens[:half], sample.tokens[half:]
            return asked, (), self.tokenizer.decode(rest), self.tokenizer.decode(asked)
        answer = sample.spans[np.flatnonzero(roles == Role.ASSISTANT)[-1]]
        end = int(answer["start"])
        image_ids = sample.image_ids[: sum(position < end for position in sample.image_positions)]
        asked = [span for span in sample.spans if span["role"] == Role.USER and span["start"] < end]
        question = self._text(sample, asked[-1]) if asked else ""
        reference = sample.answers[0] if sample.answers else self._text(sample, answer)
        return sample.tokens[:end], image_ids, reference, question

    def _text(self, sample: Sample, span: np.void) -> str:
        start = int(span["start"])
        return self.tokenizer.decode(sample.tokens[start : start + int(span["len"])])

    def sample_key(self, index: int) -> tuple[str, tuple[str, ...]]:
        """Source key and gold answers of a sample; DataError if they do not match their crc."""
        offset = int(self._samples[index]["key_off"])
        header_bytes = self._keys[offset : offset + KEY_HEADER.itemsize].tobytes()
        if len(header_bytes) == KEY_HEADER.itemsize:
            header = np.frombuffer(header_bytes, dtype=KEY_HEADER)[0]
            start, answers_start = offset + KEY_HEADER.itemsize, int(header["answers_off"])
            key = self._keys[start : start + int(header["key_len"])].tobytes()
            answers = self._answers[
                answers_start : answers_start + int(header["answers_len"])
            ].tobytes()
            if zlib.crc32(answers, zlib.crc32(key)) == header["crc32"]:
                return key.decode(), tuple(json.loads(answers))
        raise DataError(
            f"sample {index}: its record in {self.path / names.KEYS} or "
            f"{self.path / names.ANSWERS} is damaged: {_ADVICE}"
        )

    def gather(self, indices: np.ndarray) -> Gathered:
        """Several samples end to end, checked.

        Raises:
            DataError: bytes that do not match their crc, or records that contradict each other.
        """
        records = self._samples[indices]
        self._check_crc(indices, records)
        tok_lens = records["tok_len"].astype(np.int64)
        image_counts = records["n_images"].astype(np.int64)
        span_counts = records["n_spans"].astype(np.int64)
        starts = np.cumsum(tok_lens) - tok_lens
        tokens = self._tokens[ranges(records["tok_off"].astype(np.int64), tok_lens)].astype(
            np.int64
        )
        refs = self._refs[ranges(records["img_off"].astype(np.int64), image_counts)]
        spans = self._spans[ranges(records["span_off"].astype(np.int64), span_counts)]
        positions = refs["pos"] + np.repeat(starts, image_counts)
        self._check_structure(
            indices, tokens, positions, refs, spans, np.repeat(tok_lens, span_counts)
        )
        trained = spans["train"] != 0
        begin = (spans["start"] + np.repeat(starts, span_counts))[trained]
        # +1 where a trained span begins, -1 after it ends; spans do not overlap.
        edges = np.zeros(len(tokens) + 1, dtype=np.int8)
        edges[begin] += 1
        edges[begin + spans["len"][trained]] -= 1
        mask = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
        mask[positions] = False  # a picture in a trained turn is no token to predict
        return Gathered(
            tokens=tokens,
            trained=mask,
            tok_lens=tok_lens,
            image_counts=image_counts,
            image_ids=refs["image_id"].astype(np.int64),
            image_positions=positions,
        )

    def crc_problem(self, index: int) -> str | None:
        """What is wrong with the stored bytes of a sample, or None."""
        try:
            self._check_crc(np.array([index]), self._samples[[index]])
        except DataError as error:
            return str(error)
        return None

    def _check_crc(self, indices: np.ndarray, records: np.ndarray) -> None:
        # Byte views: slicing a memoryview costs a third of slicing a structured array.
        table, tokens, refs, spans = self._bytes
        width = self._tokens.dtype.itemsize
        fields = ("tok_off", "tok_len", "img_off", "n_images", "span_off", "n_spans", "crc32")
        columns = [records[field].tolist() for field in fields]
        for index, t, tn, r, rn, s, sn, expected in zip(indices.tolist(), *columns, strict=True):
            record = index * RECORD_BYTES
            crc = zlib.crc32(table[record : record + SAMPLE_CRC_OFFSET])
            crc = zlib.crc32(tokens[t * width : (t + tn) * width], crc)
            crc = zlib.crc32(refs[r * IMAGE_REF.itemsize : (r + rn) * IMAGE_REF.itemsize], crc)
            crc = zlib.crc32(spans[s * SPAN.itemsize : (s + sn) * SPAN.itemsize], crc)
            if crc != expected:
                raise DataError(
                    f"sample {index} in {self.path / 'samples'} does not match its crc, "
                    f"so the file is damaged: {_ADVICE}"
                )

    def _check_structure(
        self,
        indices: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray,
        refs: np.ndarray,
        spans: np.ndarray,
        span_limits: np.ndarray,
    ) -> None:
        """Rules that a wrong writer could break with a right crc."""
        info = self.manifest.tokenizer
        image_token = info.specials["image"]
        ends = spans["start"].astype(np.int64) + spans["len"]
        if len(tokens) and tokens.max() >= info.vocab_size:
            problem = f"token {tokens.max()} is not below the vocabulary size {info.vocab_size}"
        elif len(positions) and (
            positions.max() >= len(tokens) or (tokens[positions] != image_token).any()
        ):
            problem = "an image reference does not stand on an <|image|> token"
        elif np.count_nonzero(tokens == image_token) != len(positions):
            problem = "there are <|image|> tokens without an image"
        elif len(refs) and refs["image_id"].max() >= self.num_images:
            problem = f"image {refs['image_id'].max()} of {self.num_images} does not exist"
        elif (ends > span_limits).any():
            problem = "a span ends after its sample"
        else:
            return
        raise DataError(
            f"{self.path}: samples {indices.tolist()[:8]}...: {problem}; ingest the data again"
        )

    # --- index only

    def image_ids(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image ids of samples, joined in reading order, and how many each has (both int64).

        Raises:
            DataError: a record points outside of images.ref.
        """
        records = self._samples[indices]
        counts = records["n_images"].astype(np.int64)
        rows = ranges(records["img_off"].astype(np.int64), counts)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._refs):
            raise DataError(
                f"{self.path / names.SAMPLE_INDEX} refers to images that "
                f"{names.IMAGE_REFS} does not hold, so it is damaged: {_ADVICE}"
            )
        return self._refs["image_id"][rows].astype(np.int64), counts

    def lengths(self, *, tokens_per_image: int) -> np.ndarray:
        """Positions that each sample takes, images expanded: int64 [num_samples]."""
        text = self._samples["tok_len"].astype(np.int64)
        return text + self._samples["n_images"].astype(np.int64) * (tokens_per_image - 1)

    # --- images

    def image_bytes(self, image_id: int) -> bytes:
        """Encoded bytes as they were ingested.

        Raises:
            IndexError: no such image.
            DataError: the bytes do not match their crc; names shard and image.
        """
        if not 0 <= image_id < self.num_images:
            raise IndexError(f"image {image_id} of {self.num_images} in {self.path}")
        record = self._images[image_id]
        name = shard_name(int(record["shard"]))
        offset, size = int(record["offset"]), int(record["size"])
        listed = self.manifest.files.get(name)
        if listed is None or offset + size > listed.bytes:
            raise DataError(
                f"image {image_id}: its record in {self.path / names.MEDIA_INDEX} points out of "
                f"the shards, so the file is damaged: {_ADVICE}"
            )
        data = os.pread(self._shard(name), size, offset)
        if zlib.crc32(data) != record["crc32"]:
            raise DataError(
                f"image {image_id} in {self.path / name} does not match its crc, "
                f"so the shard is damaged: {_ADVICE}"
            )
        return data

    def _shard(self, name: str) -> int:
        """Descriptor of a shard, opened once; threads that read ahead may ask together."""
        with self._shards_lock:
            if name not in self._shards:
                self._shards[name] = os.open(self.path / name, os.O_RDONLY)
            return self._shards[name]

    def close(self) -> None:
        """Close the shards; the arrays stay valid as long as something refers to them."""
        for descriptor in self._shards.values():
            os.close(descriptor)
        self._shards.clear()
