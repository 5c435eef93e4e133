"""What lies in the files comes back element by element, and no damage goes unnoticed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.tensors import write_tensors
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json
from tests.checkpoint.tiny import CUT_AT, NAME, NORM, NORM_VALUES, WHOLE, part_of, write_tiny

pytestmark = pytest.mark.durability

FILES = [
    "llm-00000.safetensors",
    "llm-00001.safetensors",
    "optimizer-00003.safetensors",
    "random-00000.safetensors",
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "step-00000003")


def test_the_stock_library_reads_our_files(tmp_path: Path):
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.randn(2, 3).to(torch.bfloat16),
        "c": torch.randn(5),
        "d": torch.arange(4).view(2, 2),
    }
    path = tmp_path / "x.safetensors"
    size, _ = write_tensors(path, list(tensors.items()), metadata={"k": "v"})
    assert path.stat().st_size == size
    back = load_file(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())


def test_parts_of_tensor_ranks_make_the_whole(checkpoint: Path):
    with CheckpointReader(checkpoint) as reader:
        assert torch.equal(reader.weight(NAME), WHOLE)
        assert torch.equal(reader.weight(NORM), NORM_VALUES)


@pytest.mark.parametrize(
    ("start", "length"), [(0, 24), (0, CUT_AT), (CUT_AT, 5), (CUT_AT - 3, 7), (23, 1)]
)
def test_any_run_of_elements_is_found_over_file_borders(checkpoint: Path, start: int, length: int):
    with CheckpointReader(checkpoint) as reader:
        for rank in range(2):
            got = reader.read(
                "optimizer",
                NAME,
                tensor_rank=rank,
                start=start,
                length=length,
                prefix="exp_avg/",
            )
            assert torch.equal(got, -part_of(rank).flatten()[start : start + length])


def test_elements_that_no_file_holds_are_named(checkpoint: Path):
    with CheckpointReader(checkpoint) as reader:
        with pytest.raises(CheckpointError, match=f"no optimizer of {NAME} at element 24 of .* 1"):
            reader.read("optimizer", NAME, tensor_rank=1, start=20, length=5)
        assert reader.missing("optimizer", NORM, tensor_rank=0, start=0, length=1)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found_and_its_file_named(checkpoint: Path, name: str):
    file = checkpoint / name
    data = file.read_bytes()
    with CheckpointReader(checkpoint) as reader:
        assert reader.damage(reader.files()) == []
        for at in {0, 9, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            (problem,) = reader.damage(reader.files())
            assert problem.startswith(f"{file} is damaged: its sha256 is ")


def test_a_cut_and_a_missing_file_are_named(checkpoint: Path):
    first, second = (checkpoint / name for name in FILES[:2])
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with CheckpointReader(checkpoint) as reader:
        cut, missing = reader.damage(reader.files("weights"))
    assert cut.startswith(f"{first} is damaged: it has ")
    assert missing == f"{second} is missing"


def test_every_flipped_byte_of_the_manifest_is_found(checkpoint: Path):
    file = checkpoint / "manifest.json"
    data = file.read_bytes()
    for at in range(0, len(data), 37):
        file.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match="manifest.json"):
            read_manifest(checkpoint)


def change_file_name(document: dict, name: str) -> None:
    document["files"][name] = document["files"].pop(FILES[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: change_file_name(d, "../llm-00000.safetensors"), "no name of a checkpoint's"),
        (lambda d: change_file_name(d, "/etc/passwd"), "no name of a checkpoint's"),
        (lambda d: d["files"][FILES[0]]["slices"].update(other=[0, 1]), "not among the parameters"),
        (lambda d: d["files"][FILES[0]]["slices"].update({NAME: [-1, 5]}), "no slice"),
        (lambda d: d["files"][FILES[0]].update(bytes="many"), "valid integer"),
        (lambda d: d.update(step=True), "field `step`: .*valid integer"),
    ],
)
def test_a_manifest_that_means_harm_is_refused(checkpoint: Path, change: Callable, says: str):
    file = checkpoint / "manifest.json"
    document = json.loads(file.read_bytes())
    change(document)
    del document["digest"]
    document["digest"] = hashlib.sha256(canonical_json(document)).hexdigest()
    file.write_bytes(canonical_json(document))
    with pytest.raises(CheckpointError, match=says):
        read_manifest(checkpoint)


def test_a_later_schema_is_refused(checkpoint: Path):
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"gvc/1"', b'"gvc/2"'))
    with pytest.raises(CheckpointError, match="schema 'gvc/2', this version reads 'gvc/1'"):
        read_manifest(checkpoint)
