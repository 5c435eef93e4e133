"""Timings of the data path against their bars: planning, loading, opening, ingesting.

Figures for one core are by CPU time, which other programs on the machine disturb less.
"""

import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.encode import Row
from ghostvis_mega.data.images import load_pixels
from ghostvis_mega.data.ingest import Source, ingest
from ghostvis_mega.data.layout import shard_name
from ghostvis_mega.data.order import hash_u64
from ghostvis_mega.data.plan import build_plan, save_plan
from ghostvis_mega.data.readers.tars import walk_tar
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import train_tokenizer
from ghostvis_mega.perf.bench_energon import Energon, EnergonSpeed, measure_energon
from ghostvis_mega.perf.bench_plan import (
    PARAMS,
    SAMPLES_AN_IMAGE,
    SEQ_LENGTH,
    TOKENS_PER_IMAGE,
    plan_once,
)
from ghostvis_mega.perf.synthetic_data import mixed_text_lengths, write_synthetic
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.figures import Figure, at_least, at_most, measured

log = logging.getLogger(__name__)

SIDE = 336
WIDTH, HEIGHT = 640, 480
THREADS = 2
BATCH_SIZE = 16
_RUNS = 5
_MANY, _INGESTED = "many.gvd", "in.gvd"
_MEMBERS = "members/s"
_WHAT = f"JPEG {WIDTH}x{HEIGHT} to uint8 {SIDE}"
# By CPU time: of two cores that do nothing else. Wall time beside shows what threads cost.
_PER_CPU = f"{_WHAT}, {THREADS} cores by CPU time"


def measure_data(folder: Path | None = None, *, energon: Energon | None = None) -> list[Figure]:
    """All rows of name, value, unit, bar and ok; about two minutes on two cores.

    Args:
        folder: where some hundred MB are written and removed; by default the system's.
        energon: to show its figures beside ours; what cannot be measured has no value and is not
            ok.
    """
    rows: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        pictures = [photo(number) for number in range(64)]
        parts = [_plans(), _million(place), _loader(place, pictures), _ingest(place, pictures)]
        if energon is not None:
            parts.append(_energon(place, energon))
        for part in parts:
            for row in part:
                if row["value"] is not None:
                    log.info("%s: %.4g %s", row["name"], row["value"], row["unit"])
                rows.append(row)
    return rows


def photo(seed: int, *, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A JPEG with the detail, and so about the bytes and the decoding time, of a photograph."""
    coarse = hash_u64(np.arange(32 * 24 * 3), seed, 1) % np.uint64(256)
    fine = hash_u64(np.arange(width * height), seed, 2) % np.uint64(25)
    smooth = Image.fromarray(coarse.astype(np.uint8).reshape(24, 32, 3))
    smooth = smooth.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).astype(np.int16) + fine.astype(np.int16).reshape(height, width, 1)
    buffer = io.BytesIO()
    Image.fromarray((pixels - 12).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _plans() -> Iterator[Figure]:
    best = min((plan_once(1_000_000) for _ in range(3)), key=lambda found: found["cpu_s"])
    yield at_least("plan, 1M samples, grouped", 1e6 / best["cpu_s"], "samples/s/core", 500_000)
    yield at_least("plan, share of positions filled", best["fill"], "", 0.99)
    code = (
        "import json; from ghostvis_mega.perf.bench_plan import plan_once; "
        "print(json.dumps(plan_once(10_000_000)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    yield at_most("plan, 10M samples", found["wall_s"], "s", 30)
    yield at_most("plan, 10M samples, peak memory", found["peak_gb"], "GB", 2)


def _million(folder: Path) -> Iterator[Figure]:
    path = folder / "million.gvd"
    text, pictured = mixed_text_lengths(1_000_000, seed=0)
    images = 1000
    write_synthetic(
        path,
        text_lengths=text,
        image_of=np.where(pictured, np.arange(len(text)) // SAMPLES_AN_IMAGE % images, -1),
        pictures=[(b"%d" % number, 4, 4) for number in range(images)],
    )
    opened = min(_wall(lambda: Dataset.open(path).close()) for _ in range(_RUNS))
    yield at_most("open 1M samples", 1000 * opened, "ms", 20)
    with Dataset.open(path) as dataset:
        save_plan(dataset, build_plan(dataset, PARAMS))
        restored = min(_wall(lambda: _restore(path)) for _ in range(_RUNS))
        yield at_most(
            "first batch of a rank (text) after a restore, 1M samples", restored, "s", 0.5
        )
        yield from _tokens(_source(dataset))


def _source(dataset: Dataset) -> BatchSource:
    return BatchSource(
        dataset,
        seq_length=SEQ_LENGTH,
        global_size=256,
        micro_size=1,
        data_parallel=8,
        packing=True,
        tokens_per_image=TOKENS_PER_IMAGE,
        seed=0,
    )


def _restore(path: Path) -> None:
    """Open, find the batch of a late step, and read the micro-batches of one of its ranks."""
    with Dataset.open(path) as dataset:
        source = _source(dataset)
        for rows in source.global_batch(123_456).replicas[0]:
            source.micro_batch(rows)


def _tokens(source: BatchSource) -> Iterator[Figure]:
    batches = [source.global_batch(step) for step in range(3)]
    rows = [row for batch in batches for row in batch.sequences]
    useful = sum(row.num_tokens for row in rows)
    spent = []
    for _ in range(3):
        began = time.process_time()
        for row in rows:
            source.micro_batch((row,))
        spent.append(time.process_time() - began)
    name = "tokens with masks, positions and cu_seqlens"
    yield at_least(name, useful / min(spent), "tokens/s/core", 10_000_000)
    spent = []
    for step in range(_RUNS):
        began = time.process_time()
        source.global_batch(1000 + step)
        spent.append(time.process_time() - began)
    yield measured("find and spread 256 packs of a step", 1000 * min(spent), "ms", ok=True)


def _loader(folder: Path, pictures: list[bytes]) -> Iterator[Figure]:
    path = folder / "photos.gvd"
    write_synthetic(
        path,
        text_lengths=np.full(len(pictures), 16),
        image_of=np.arange(len(pictures)),
        pictures=[(data, WIDTH, HEIGHT) for data in pictures],
    )
    starts = range(0, len(pictures), BATCH_SIZE)
    batches = [range(start, start + BATCH_SIZE) for start in starts] * 10
    count = sum(len(batch) for batch in batches)
    with Dataset.open(path) as dataset:
        loaded = _threads(lambda ids: load_pixels(dataset, ids, size=SIDE, seeds=None), batches)
    raw = _threads(lambda ids: [_pillow(pictures[number]) for number in ids], batches)
    per_wall = f"{_WHAT}, {THREADS} threads, wall"
    yield at_least(f"loader, {_PER_CPU}", count * THREADS / loaded.cpu, "images/s", 350)
    yield measured(f"Pillow alone, {_PER_CPU}", count * THREADS / raw.cpu, "images/s", ok=True)
    yield measured(f"loader, {per_wall}", count / loaded.wall, "images/s", ok=True)
    yield measured(f"Pillow alone, {per_wall}", count / raw.wall, "images/s", ok=True)
    yield from _tar(folder)


class _Seconds(NamedTuple):
    wall: float
    cpu: float


def _threads(work: Callable[[range], object], batches: list[range]) -> _Seconds:
    """Best seconds of two passes."""
    spent = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in pool.map(work, batches):
                pass
            spent.append((time.perf_counter() - wall, time.process_time() - cpu))
    return _Seconds(min(wall for wall, _ in spent), min(cpu for _, cpu in spent))


def _pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _tar(folder: Path) -> Iterator[Figure]:
    count = 50_000
    write_synthetic(
        folder / _MANY,
        text_lengths=np.full(4, 16),
        image_of=np.full(4, -1),
        pictures=[(b"%d" % number, 4, 4) for number in range(count)],
    )
    tar = folder / _MANY / shard_name(0)
    spent = []
    for _ in range(3):
        began = time.process_time()
        found = sum(1 for _ in walk_tar(tar))
        spent.append(time.process_time() - began)
    assert found == count
    yield at_least("index of a tar", count / min(spent), _MEMBERS, 100_000)


def _ingest(folder: Path, pictures: list[bytes]) -> Iterator[Figure]:
    words = ["what is in the picture?", "a photo of a street.", "user", "system", "tool"]
    tokenizer = train_tokenizer(words, vocab_size=300, path=folder / "words.model")
    rows = []
    for number in range(1500):
        file = folder / f"{number}.jpg"
        # Bytes after the end of a JPEG are ignored: another picture by content, as quick to make.
        file.write_bytes(pictures[number % len(pictures)] + b"%d" % number)
        turns = (Turn("user", (ImagePart(), words[0])), Turn("assistant", (words[1],)))
        rows.append(Row(f"{number}", turns, (file,), ()))
    began = time.perf_counter()
    manifest = ingest(
        [Source("photos", rows)], tokenizer=tokenizer, path=folder / _INGESTED, workers=THREADS
    )
    seconds = time.perf_counter() - began
    assert manifest.counts.images == len(rows)
    name = f"ingest with validation, {THREADS} processes"
    yield at_least(name, len(rows) / seconds, "images/s", 300)


def _energon(folder: Path, energon: Energon) -> Iterator[Figure]:
    """Beside `_loader` and `_tar`: the ingested pictures, and the same tar of small members."""
    speed, problem = None, energon.problem
    if energon.python is not None:
        try:
            speed = _energon_speed(folder, energon.python)
        except GhostVisError as error:
            problem = str(error)
    if speed is None:
        log.error("energon %s is not measured: %s", energon.version, problem)
    per_wall = f"{_WHAT}, {THREADS} worker processes, wall"
    for what, value, unit in (
        (f"loader, {_PER_CPU}", speed and speed.images_per_cpu_s * THREADS, "images/s"),
        (f"loader, {per_wall}", speed and speed.images_per_wall_s, "images/s"),
        ("prepare of the same tar, SQLite included", speed and speed.prepared_per_cpu_s, _MEMBERS),
    ):
        name = f"energon {energon.version} {what}"
        yield measured(name, value, unit, ok=value is not None)


def _energon_speed(folder: Path, python: str) -> EnergonSpeed:
    return measure_energon(
        python,
        dataset=folder / _INGESTED,
        tar=folder / _MANY / shard_name(0),
        side=SIDE,
        batch_size=BATCH_SIZE,
        workers=THREADS,
    )


def _wall(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
