"""A run that is right, and a prepared dataset (manifest and files of the right size) for it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.manifest import (
    MEDIA_INDEX,
    RECORD_BYTES,
    REQUIRED_FILES,
    SAMPLE_INDEX,
    write_manifest,
)

ROOT = Path(__file__).resolve().parents[2]

RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {folder}/train.gvd, heldout: {folder}/test.gvd, seq_length: 256}}
batch: {{global_size: 16}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: 100}}
log: {{output: {folder}/run}}
"""


def write_dataset(
    folder: Path,
    *,
    samples: int = 16,
    images: int = 4,
    trained_tokens: int = 99,
    vocab_size: int = 400,
    tokenizer: bytes = b"a tokenizer",
    template: str = "chatml",
    specials: tuple[str, ...] = ("pad", "im_start", "im_end", "image"),
) -> None:
    """A directory that passes the manifest's checks; its records are zeros."""
    content = dict.fromkeys(REQUIRED_FILES, b"")
    content[SAMPLE_INDEX] = bytes(samples * RECORD_BYTES)
    content[MEDIA_INDEX] = bytes(images * RECORD_BYTES)
    content["tokenizer.model"] = tokenizer
    files = {}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    counts = {"samples": samples, "images": images, "tokens": 999, "rejected": 0}
    document = {
        "counts": {**counts, "trained_tokens": trained_tokens},
        "tokenizer": {
            "kind": "sentencepiece",
            "file": "tokenizer.model",
            "sha256": hashlib.sha256(tokenizer).hexdigest(),
            "vocab_size": vocab_size,
            "specials": {name: i for i, name in enumerate(specials)},
        },
        "template": {"name": template},
        "sources": [{"name": folder.name, "rows": samples, "rejected": 0}],
        "files": files,
    }
    write_manifest(folder, document)


@pytest.fixture
def make_dataset() -> Callable[..., None]:
    """`write_dataset`, for tests that need another one."""
    return write_dataset


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """YAML of a run without problems for 1, 2 or 4 processes; the working directory is the root."""
    monkeypatch.chdir(ROOT)
    write_dataset(tmp_path / "train.gvd")
    write_dataset(tmp_path / "test.gvd", samples=4)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path), encoding="utf-8")
    return path


@pytest.fixture
def make_run(run_file: Path) -> Callable[..., RunConfig]:
    """Build the right run with some settings changed."""
    return lambda *overrides: load_run_config(run_file, overrides)
