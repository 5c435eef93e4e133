"""Conversion of whole models there and back: bits, memory, and time against a plain copy."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.config.presets import MODEL_PRESETS, TOWER_PRESETS
from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.convert.block_reader import Buffer
from ghostvis_mega.convert.hf_config import choose_format, config_of_parts
from ghostvis_mega.convert.hf_folder import CONFIG, HFFolder
from ghostvis_mega.convert.mapping import Parts, entries
from ghostvis_mega.convert.output import SHARD_BYTES, check_space, hf_shards, write_index
from ghostvis_mega.convert.table import LAYOUTS
from ghostvis_mega.convert.tensor_file import TensorFileWriter, TensorInfo
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.figures import Figure, at_least, at_most, measured
from ghostvis_mega.utils.files import sha256_file

IMAGE_TOKEN = 151_655
SHARE_OF_COPY = 0.8
LARGEST_MEMORY_GB = 2.0
_BLOCK = 32 << 20


def _llava(tower: str) -> dict[str, Any]:
    return {
        "llm": MODEL_PRESETS["qwen25_1_5b"]["llm"],
        "vision": TOWER_PRESETS[tower],
        "connector": {"kind": "mlp"},
    }


MODELS: dict[str, dict[str, Any]] = {
    "qwen25_1_5b": MODEL_PRESETS["qwen25_1_5b"],
    "qwen25_7b": MODEL_PRESETS["qwen25_7b"],
    "llava_siglip": _llava("siglip_so400m_14"),
    "llava_clip": _llava("clip_l_14_336"),
}
"""True shapes; the two LLaVA models are on the 1.5B language model."""


@dataclass(frozen=True)
class Timed:
    """One run of something in a process of its own."""

    seconds: float
    cpu_seconds: float
    """Of all threads."""
    memory_gb: float
    """Greatest resident memory, the interpreter and torch included."""


def bench_model(
    name: str, folder: Path, *, rounds: int, progress: Callable[[str], None]
) -> list[Figure]:
    """Rows about one model.

    Args:
        name: Key of `MODELS`.
        folder: With room for two copies of it; left empty.
        rounds: How often each of copy, import and export is timed; the best counts.
        progress: Told what is being done.

    Raises:
        CheckpointError: No such model, or no room.
    """
    if name not in MODELS:
        raise CheckpointError(f"--model {name} is unknown: use one of {', '.join(MODELS)}")
    parts = Parts.of(ModelConfig.model_validate(MODELS[name]))
    source, other = folder / "source", folder / "other"
    progress(f"{name}: random weights")
    digests, size = make_random(source, parts)
    copy, verified, there, back = [], [], [], []
    # In turn, so that what the disk is doing besides meets all of them alike.
    for _ in range(rounds):
        for what, runs in (("copy", copy), ("verified-copy", verified), ("import", there)):
            progress(f"{name}: {what}")
            shutil.rmtree(other, ignore_errors=True)
            runs.append(_timed(what, source, other))
        progress(f"{name}: export")
        shutil.rmtree(source)
        back.append(_timed("export", other, source))
    progress(f"{name}: comparison")
    found = dict(_digests(source))
    shutil.rmtree(source)
    shutil.rmtree(other)
    different = [n for n in digests.keys() | found.keys() if digests.get(n) != found.get(n)]
    gigabytes = size / 1e9
    speed = gigabytes / min(run.seconds for run in copy)
    rows = [
        measured(f"{name}: size", gigabytes, "GB"),
        measured(f"{name}: tensors", len(digests), "tensors"),
        at_most(f"{name}: different after the way there and back", len(different), "tensors", 0),
        measured(f"{name}: plain copy", speed, "GB/s"),
        measured(f"{name}: plain copy, CPU", min(run.cpu_seconds for run in copy), "s"),
        measured(
            f"{name}: copy and SHA-256 of both",
            gigabytes / min(run.seconds for run in verified),
            "GB/s",
        ),
    ]
    for what, runs in (("import", there), ("export", back)):
        own = gigabytes / min(run.seconds for run in runs)
        memory = max(run.memory_gb for run in runs)
        rows.append(measured(f"{name}: {what}", own, "GB/s"))
        rows.append(at_least(f"{name}: {what} / copy", own / speed, "share", SHARE_OF_COPY))
        rows.append(measured(f"{name}: {what}, CPU", min(run.cpu_seconds for run in runs), "s"))
        rows.append(at_most(f"{name}: {what}, memory", memory, "GB", LARGEST_MEMORY_GB))
    return rows


def make_random(folder: Path, parts: Parts) -> tuple[dict[str, str], int]:
    """Write a BF16 model of random bits; returns each tensor's SHA-256 and the size in bytes."""
    folder.mkdir(parents=True)
    form = choose_format(parts, "auto")
    infos = {
        tensor.name: TensorInfo("BF16", tensor.shape)
        for entry in entries(parts, LAYOUTS[form])
        for tensor in entry.hf
    }
    shards = hf_shards(infos, largest=SHARD_BYTES)
    check_space(folder, [*shards, *shards])
    generator = np.random.Generator(np.random.PCG64(0))
    block = generator.integers(0, 1 << 16, _BLOCK // 2, dtype=np.uint16)
    digests: dict[str, str] = {}
    for file, content in shards:
        with TensorFileWriter(folder / file, content) as writer:
            for name, info in content:
                digest = hashlib.sha256()
                salt = generator.integers(0, 1 << 16, dtype=np.uint16)
                writer.write(name, _salted(block, salt, info.num_bytes, digest))
                digests[name] = digest.hexdigest()
    write_index(folder, shards)
    llm = parts.llm
    vocab = llm.vocab_size if llm else 0
    tokens = {"image": min(IMAGE_TOKEN, vocab - 1)}
    config = config_of_parts(parts, form, dtype="bfloat16", vocab=vocab, tokens=tokens)
    (folder / CONFIG).write_text(json.dumps(config))
    return digests, sum(info.num_bytes for info in infos.values())


def _salted(block: np.ndarray, salt: np.uint16, size: int, digest: Any) -> Iterator[Buffer]:
    """Random bits that are others for every tensor and every block of it."""
    for number, at in enumerate(range(0, size, _BLOCK)):
        piece = (block[: min(_BLOCK, size - at) // 2] ^ salt) + np.uint16(number)
        data = memoryview(piece.view(np.uint8))
        digest.update(data)
        yield data


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    with HFFolder(folder) as weights:
        for name, info in weights.tensors.items():
            digest = hashlib.sha256()
            for chunk in weights.chunks(name, 0, info.num_bytes // info.item_bytes):
                digest.update(chunk)
            yield name, digest.hexdigest()


def _timed(what: str, source: Path, out: Path) -> Timed:
    """Run one step as a process; its own clock counts, so that starting Python does not.

    What it reads is on the disk and not in memory, as a model is that has just been downloaded.
    """
    for path in source.iterdir():
        with open(path, "rb") as file:
            # What is not on the disk yet would stay in memory.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "ghostvis_mega.convert.bench", what, str(source), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        raise CheckpointError(f"{what} of {source} ended with {done.returncode}")
    seconds, cpu_seconds, memory = map(float, done.stdout.split())
    return Timed(seconds=seconds, cpu_seconds=cpu_seconds, memory_gb=memory / 1e9)


def _copy(source: Path, out: Path) -> None:
    """What `cp` does, and the wait for the disk that conversion has as well."""
    out.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb+") as file:
            os.fsync(file.fileno())


def _step(what: str, source: Path, out: Path) -> None:
    from ghostvis_mega.convert.assets import Assets
    from ghostvis_mega.convert.exporter import ExportOptions, export_hf
    from ghostvis_mega.convert.importer import ImportOptions, import_hf
    from ghostvis_mega.convert.native import NativeWeights

    if what == "copy":
        _copy(source, out)
    elif what == "verified-copy":
        _copy(source, out)
        for path in sorted(source.iterdir()):
            if sha256_file(path) != sha256_file(out / path.name):
                raise CheckpointError(f"{out / path.name} is no copy of {path}")
    elif what == "import":
        import_hf([source], out, ImportOptions())
    else:
        with NativeWeights(source) as weights:
            vocab = weights.parts.llm.vocab_size if weights.parts.llm else 0
        assets = Assets(tokens={"image": min(IMAGE_TOKEN, vocab - 1)})
        export_hf(source, out, ExportOptions(assets=assets))


def main() -> None:
    """One timed step; prints its seconds."""
    what, source, out = sys.argv[1:]
    # Modules are loaded before the clock starts.
    import ghostvis_mega.convert.exporter
    import ghostvis_mega.convert.importer  # noqa: F401

    # Else a collection of garbage walks over all that modules made, 0.1 s, in some run or other.
    gc.freeze()
    began, worked = time.perf_counter(), time.process_time()
    _step(what, Path(source), Path(out))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    sys.stdout.write(f"{seconds} {cpu_seconds} {_peak_memory()}\n")


def _peak_memory() -> int:
    """Greatest resident bytes of this process. `ru_maxrss` would count its parent's before it
    began as well."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
