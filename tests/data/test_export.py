"""Exports are read back with the programs that they are for."""

import gc
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.export.energon import export_energon
from ghostvis_mega.data.export.megatron import export_megatron
from ghostvis_mega.data.export.webdataset import export_webdataset
from ghostvis_mega.data.ingest import Row
from ghostvis_mega.data.template import ImagePart
from ghostvis_mega.perf.energon_install import installed_energon
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

ENERGON_PYTHON = "GHOSTVIS_ENERGON_PYTHON"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(path: Path) -> dict[str, bytes]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def check_document(document: dict, row: Row, text_of: Callable[[str], str] = str) -> None:
    """The JSON of a sample says what its row said, part by part."""
    assert document["key"] == row.key
    assert document["answers"] == list(row.answers)
    numbers = iter(range(len(row.images)))
    expected = []
    for turn in row.turns:
        content = [
            {"type": "image", "index": next(numbers)}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": text_of(part)}
            for part in turn.parts
        ]
        expected.append({"role": turn.role, "content": content})
    assert document["messages"] == expected
    assert len(document["images"]) == len(row.images)


# The library leaves closing the tars to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_every_sample_and_picture(
    dataset: Dataset, rows: list[Row], tmp_path: Path
) -> None:
    webdataset = pytest.importorskip("webdataset")
    out = tmp_path / "wds"
    document = export_webdataset(dataset, out, shard_bytes=20_000)
    shards = [str(out / name) for name in document["shards"]]
    assert len(shards) > 2
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in read] == [f"{n:09d}" for n in range(len(rows))]
    for sample, row in zip(read, rows, strict=True):
        described = json.loads(sample["json"])
        check_document(described, row)
        found = [sample[name] for name in described["images"]]
        assert found == [picture.read_bytes() for picture in row.images]


def test_tars_are_plain_ustar_and_as_described(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "wds"
    document = export_webdataset(dataset, out)
    (name,) = document["shards"]
    data = (out / name).read_bytes()
    assert document["shards"][name] == {
        "samples": dataset.num_samples,
        "bytes": len(data),
        "sha256": digest(data),
    }
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        assert all(member.isreg() and member.mtime == 0 for member in tar)
    assert data[257:263] == b"ustar\0"


@pytest.mark.parametrize("export", [export_webdataset, export_energon])
def test_exports_are_repeatable_and_atomic(
    export: Callable[..., dict], dataset: Dataset, tmp_path: Path
) -> None:
    export(dataset, tmp_path / "a", shard_bytes=50_000)
    export(dataset, tmp_path / "b", shard_bytes=50_000)
    first = tree(tmp_path / "a")
    assert first == tree(tmp_path / "b")
    with pytest.raises(DataError, match="exists already"):
        export(dataset, tmp_path / "a")
    export(dataset, tmp_path / "b", force=True)
    assert tree(tmp_path / "b") != first
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=r"holds no export\.json"):
        export(dataset, tmp_path / "mine", force=True)

    def stop(done: int, total: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(dataset, tmp_path / "c", progress=stop)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "mine"]


def test_energon_index_points_at_the_samples(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "energon"
    document = export_energon(dataset, out, shard_bytes=50_000)
    total = 0
    for name, shard in document["shards"].items():
        offsets = np.fromfile(out / f"{name}.idx", dtype="<u8").tolist()
        assert len(offsets) == shard["samples"] + 1
        data = (out / name).read_bytes()
        for start, end in zip(offsets, offsets[1:], strict=False):
            with tarfile.open(fileobj=io.BytesIO(data[start:end]), mode="r:") as tar:
                keys = {member.name.split(".")[0] for member in tar}
            assert keys == {f"{total:09d}"}
            total += 1
        assert data[offsets[-1] :] == bytes(1024)
    assert total == dataset.num_samples
    with pytest.raises(DataError, match="no split 'dev'"):
        export_energon(dataset, tmp_path / "other", split="dev")


def energon_python() -> str:
    """A Python that has megatron-energon."""
    if given := os.environ.get(ENERGON_PYTHON):
        return given
    if importlib.util.find_spec("megatron.energon") is not None:
        return sys.executable
    if installed := installed_energon():
        return installed
    pytest.skip(
        "megatron-energon is not installed, so the export is not opened with it: run `python -m "
        f"ghostvis_mega bench data` once, or set {ENERGON_PYTHON} to a python that has it"
    )


def test_energon_opens_the_export_and_yields_every_sample(
    dataset: Dataset, rows: list[Row], tmp_path: Path
) -> None:
    python = energon_python()
    out = tmp_path / "energon"
    export_energon(dataset, out, split="val", shard_bytes=50_000)
    command = [python, str(Path(__file__).with_name("energon_reader.py")), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout.splitlines()[-1])
    expected = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                expected[member.name] = digest(file.read())
    assert read["stored"] == expected
    found = {f"{key}.{p}": sha for key, one in read["samples"].items() for p, sha in one.items()}
    assert found == expected
    assert len(read["samples"]) == len(rows)
    pictures = {digest(picture.read_bytes()) for row in rows for picture in row.images}
    assert pictures <= set(expected.values())


def text_dataset(rows: list[Row], build: Callable[..., Path]) -> Path:
    return build([row for row in rows if not row.images] * 3, "text.gvd")


@pytest.mark.parametrize("append_eod", [False, True])
def test_megatron_reads_the_tokens_bit_for_bit(
    append_eod: bool,
    rows: list[Row],
    build: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")  # Megatron warns when it has to guess
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    path = text_dataset(rows, build)
    prefix = path.with_name("text")
    with Dataset.open(path) as dataset:
        document = export_megatron(dataset, prefix, append_eod=append_eod)
        end = [dataset.tokenizer.specials["endoftext"]] if append_eod else []
        expected = [[*dataset.sample(n).tokens.tolist(), *end] for n in range(dataset.num_samples)]
        assert document["tokenizer"]["sha256"] == dataset.manifest.tokenizer.sha256
    read = indexed.IndexedDataset(str(prefix))
    assert [read[number].tolist() for number in range(len(read))] == expected
    assert read.document_indices.tolist() == list(range(len(expected) + 1))
    assert read.index.dtype == np.uint16
    # Megatron's own builder makes the same two files.
    other = path.with_name("builder")
    builder = indexed.IndexedDatasetBuilder(f"{other}.bin", dtype=np.uint16)
    for tokens in expected:
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{other}.idx")
    for ending in (".bin", ".idx"):
        theirs = other.with_name(f"builder{ending}").read_bytes()
        assert prefix.with_name(f"text{ending}").read_bytes() == theirs


def test_megatron_refuses_pictures_unless_told_to_skip_them(
    dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="50 of 60 samples have pictures"):
        export_megatron(dataset, tmp_path / "text")
    assert list(tmp_path.iterdir()) == []
    document = export_megatron(dataset, tmp_path / "text", skip_images=True)
    assert (document["documents"], document["skipped_with_images"]) == (10, 50)
    with pytest.raises(DataError, match="exists already"):
        export_megatron(dataset, tmp_path / "text", skip_images=True)


def test_a_damaged_sample_stops_the_export(rows: list[Row], build: Callable[..., Path]) -> None:
    path = text_dataset(rows, build)
    tokens = path / "samples/tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[-1] ^= 1
    tokens.write_bytes(data)
    with Dataset.open(path) as dataset:
        for export in (export_webdataset, export_energon, export_megatron):
            with pytest.raises(DataError, match="does not match its crc"):
                export(dataset, path.with_name("out"))
    assert [file.name for file in path.parent.iterdir()] == ["text.gvd"]


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return code, capsys.readouterr().out


@pytest.mark.parametrize("fmt", ["webdataset", "energon", "megatron"])
def test_commands(
    fmt: str, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ("--skip-images",) if fmt == "megatron" else ()
    arguments = ("export", fmt, dataset.path, "--out", out, *more)
    code, text = _run(capsys, *arguments, "--dry-run", "--json")
    planned = json.loads(text)
    assert (code, planned["dry_run"]) == (0, True)
    assert list(tmp_path.iterdir()) == []
    code, text = _run(capsys, *arguments, "--json")
    written = json.loads(text)
    count = "documents" if fmt == "megatron" else "samples"
    assert (code, written[count]) == (0, planned[count])
    assert written["dataset"] == dataset.manifest.digest
    assert _run(capsys, *arguments)[0] == 2
    assert "samples/s" in _run(capsys, *arguments, "--force")[1]
    text = _run(capsys, "export", fmt, "--help")[1]
    assert f"python -m tools.preprocess export {fmt}" in " ".join(text.replace("|", " ").split())
