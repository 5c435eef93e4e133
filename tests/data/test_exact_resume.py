"""The stream of batches is a function of the step: killed, restored, on other numbers of ranks."""

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.checkpoint.folder import CheckpointFolder
from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.plan import build_plan, save_plan
from ghostvis_mega.perf.synthetic_data import mixed_text_lengths, write_synthetic
from ghostvis_mega.utils.errors import CheckpointError

pytestmark = pytest.mark.durability

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("data_feeds", HERE / "feeds.py")
assert _spec is not None and _spec.loader is not None
feeds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(feeds)

KILLS, STEPS, SEED = 20, 60, 20_001
SAVED_EVERY = 3  # as resume_worker.py does


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    feeds.write_blend(path)
    return path


def _wait_for_step(file: Path, step: int, *, start: int) -> list[int]:
    """Until the stream holds `step` after byte `start`; the steps there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = file.read_bytes()[start:].splitlines(keepends=True) if file.is_file() else []
        steps = [int(line.split()[0]) for line in lines if line.endswith(b"\n")]
        if steps and steps[-1] == step:
            return steps
        time.sleep(0.002)
    raise AssertionError(f"{file} did not reach step {step} within a minute")


def _kill_at(folder: Path, kills: list[int]) -> tuple[list[int], list[str]]:
    """Stream from one step to the next, killed there; where each process began, and all lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    worker = subprocess.Popen(
        [sys.executable, str(HERE / "resume_worker.py"), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert worker.stdin is not None and worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    stream, starts = folder / "stream.txt", []
    try:
        for trial, step in enumerate(kills):
            start = stream.stat().st_size if stream.is_file() else 0
            # 0, 1 or 2 threads that read ahead.
            print(trial % 3, step, file=worker.stdin, flush=True)
            child = int(worker.stdout.readline())
            steps = _wait_for_step(stream, step, start=start)
            os.kill(child, signal.SIGKILL)
            assert worker.stdout.readline() == f"{-signal.SIGKILL}\n"
            assert steps == list(range(steps[0], step + 1))
            starts.append(steps[0])
    finally:
        worker.stdin.close()
        worker.stdout.close()
        worker.wait(timeout=60)
    return starts, stream.read_text().splitlines()


def test_killed_at_20_random_steps_the_stream_is_the_same(folder: Path) -> None:
    kills = sorted(random.Random(SEED).sample(range(STEPS), KILLS))
    print(f"killed at steps {kills}, chosen with seed {SEED}")
    whole = feeds.open_feed(folder)
    expected = [f"{step} {feeds.step_hash(*whole.get(step))}" for step in range(kills[-1] + 1)]
    starts, lines = _kill_at(folder, kills)
    stream = dict(line.split() for line in lines)
    restored = hashlib.sha256("".join(stream[str(s)] for s in range(kills[-1] + 1)).encode())
    uninterrupted = hashlib.sha256("".join(line.split()[1] for line in expected).encode())
    assert restored.hexdigest() == uninterrupted.hexdigest()
    # Also what was read a second time after a restore, from the step of the checkpoint before.
    assert all(expected[int(line.split()[0])] == line for line in lines)
    # Each process began at the checkpoint before the kill, the first one without any.
    assert starts == [0, *(kill - kill % SAVED_EVERY for kill in kills[:-1])]
    assert len(lines) > len(expected)
    assert len(set(expected)) == len(expected)
    # The hash sees what a step reads: with another seed no step is the same.
    other = feeds.open_feed(folder, "train.seed=4")
    assert feeds.step_hash(*other.get(0)) != expected[0].split()[1]
    newest = CheckpointFolder(folder / "checkpoints").newest()
    assert newest is not None
    state = read_manifest(newest).extra["data"]
    assert len(json.dumps(state)) <= 1024


def test_the_state_names_what_differs(folder: Path) -> None:
    state = json.loads(json.dumps(feeds.open_feed(folder).state()))
    feeds.open_feed(folder, "parallel.tensor=1").check_state(state, step=50)
    for override, sentence in (
        ("train.seed=4", "train.seed was 3 and is 4"),
        ("data.seq_length=320", "data.seq_length was 256 and is 320"),
        ("batch.global_size=48", "batch.global_size was 24 and is 48"),
        ("data.blend=[]", "it read 2 datasets and there are 1"),
        ("weight", "the weights of data.blend before step 31 were others"),
        ("data.blend_changes=[]", "the weights of data.blend before step 31 were others"),
    ):
        other = feeds.open_feed(folder, *_overrides(override, folder))
        with pytest.raises(CheckpointError, match=sentence):
            other.check_state(state, step=31)
    # What changes later has not been read yet.
    feeds.open_feed(folder, "data.blend_changes=[]").check_state(state, step=30)
    with pytest.raises(CheckpointError, match="data state has version None"):
        feeds.open_feed(folder).check_state({}, step=1)


def _overrides(text: str, folder: Path) -> list[str]:
    if text == "weight":
        paths = [f"{{path: {folder / name}, weight: 0.7}}" for name in ("a.gvd", "b.gvd")]
        return [f"data.blend=[{', '.join(paths)}]"]
    return ["data.blend=[]", "data.blend_changes=[]"] if text == "data.blend=[]" else [text]


def test_another_dataset_under_the_same_name_is_refused(folder: Path, tmp_path: Path) -> None:
    state = feeds.open_feed(folder).state()
    feeds.write_blend(tmp_path)
    feeds.open_feed(tmp_path).check_state(state, step=9)  # an equal copy elsewhere is fine
    (tmp_path / "b.gvd").rename(tmp_path / "old.gvd")
    write_synthetic(
        tmp_path / "b.gvd", text_lengths=np.full(150, 20), image_of=np.full(150, -1), vocab_size=400
    )
    with pytest.raises(CheckpointError, match=r"dataset 1 was b.gvd with digest \w+ and is b.gvd"):
        feeds.open_feed(tmp_path).check_state(state, step=9)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_sets_on_any_number_of_ranks(folder: Path, workers: int) -> None:
    reference = feeds.open_feed(folder)
    for data_parallel in (1, 2, 3, 4, 8):
        ranks = [
            feeds.open_feed(folder, rank=rank, data_parallel=data_parallel, workers=workers)
            for rank in range(data_parallel)
        ]
        for step in (28, 29, 30, 31):
            parts = [feed.get(step) for feed in ranks]
            _same_set(reference.get(step), parts)
        for feed in ranks:
            feed.close()


def _same_set(whole: tuple, parts: list[tuple]) -> None:
    batch, work = whole
    read = Counter(i for _, part in parts for micro in part.micro_batches for i in micro.sample_ids)
    assert read == Counter(i for micro in work.micro_batches for i in micro.sample_ids)
    weights = sum(float(m.weights_BS.sum()) for _, part in parts for m in part.micro_batches)
    assert {part.trained_tokens for _, part in parts} == {work.trained_tokens} == {weights}
    decoded = Counter(
        i for _, part in parts for ids in part.windows[0].dispatch.encode for i in ids
    )
    assert set(decoded) == set(batch.image_ids)
    assert sum(len(part.windows[0].pixels_N3hw) for _, part in parts) == len(batch.image_ids)


def test_a_chain_of_4_2_and_3_ranks_reads_each_sample_once_an_epoch(folder: Path) -> None:
    alone = ["data.blend=[]", "data.blend_changes=[]"]
    whole = feeds.open_feed(folder, *alone)
    packs = whole.source.plan.num_packs
    epochs = 24 // np.gcd(24, packs)  # so that whole steps make whole epochs
    steps = epochs * packs // 24
    assert steps >= 3
    seen: Counter[int] = Counter()
    state = whole.state()
    for part, data_parallel in enumerate((4, 2, 3)):
        ranks = [
            feeds.open_feed(folder, *alone, rank=rank, data_parallel=data_parallel)
            for rank in range(data_parallel)
        ]
        for step in range(part * steps // 3, (part + 1) * steps // 3):
            for feed in ranks:
                feed.check_state(state, step=step)
            parts = [feed.get(step) for feed in ranks]
            assert all(len(batch.replicas) == data_parallel for batch, _ in parts)
            _same_set(whole.get(step), parts)
            seen.update(
                i for _, work in parts for micro in work.micro_batches for i in micro.sample_ids
            )
        state = ranks[-1].state()
    assert len(seen) == 400
    assert set(seen.values()) == {epochs}


@pytest.mark.slow
def test_a_million_samples_open_and_restore_at_once(tmp_path: Path) -> None:
    lengths, pictured = mixed_text_lengths(1_000_000, seed=0)
    image_of = np.where(pictured, np.arange(len(lengths)) % 1000, -1)
    write_synthetic(
        tmp_path / "a.gvd",
        text_lengths=lengths,
        image_of=image_of,
        pictures=[(feeds.jpeg(k), 40, 30) for k in range(1000)],
        vocab_size=400,
    )
    (tmp_path / "run.yaml").write_text(
        feeds.RUN.format(folder=tmp_path, root=feeds.ROOT).replace(
            "seq_length: 256", "seq_length: 4096"
        )
    )
    alone = ["data.blend=[]", "data.blend_changes=[]"]
    feed = feeds.open_feed(tmp_path, *alone)
    expected = feeds.step_hash(*feed.get(777))
    dataset = Dataset.open(tmp_path / "a.gvd")
    save_plan(dataset, build_plan(dataset, feed.source.params))
    opened, restored = [], []
    for _ in range(5):
        began = time.perf_counter()
        Dataset.open(tmp_path / "a.gvd").close()
        opened.append(time.perf_counter() - began)
        began = time.perf_counter()
        again = feeds.open_feed(tmp_path, *alone)
        again.check_state(feed.state(), step=777)
        batch = again.get(777)
        restored.append(time.perf_counter() - began)
    assert feeds.step_hash(*batch) == expected
    assert min(opened) <= 0.020
    assert min(restored) <= 0.5
