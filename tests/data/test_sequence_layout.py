"""The index alone says where segments and images lie, also of samples that are damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data import manifest
from ghostvis_mega.data.batch import SequenceLayout, SequenceMeta
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.layout import IMAGE_REF
from ghostvis_mega.data.plan import Algorithm
from ghostvis_mega.data.source import BatchSource


def open_source(
    dataset: Dataset, *, packing: bool = True, align: int = 1, algorithm: Algorithm = "balanced"
) -> BatchSource:
    return BatchSource(
        dataset,
        seq_length=160,
        global_size=8,
        micro_size=1,
        data_parallel=2,
        packing=packing,
        tokens_per_image=8,
        seed=0,
        segment_align=align,
        algorithm=algorithm,
        on_damage=lambda _: None,
    )


def read(source: BatchSource, row: SequenceMeta) -> SequenceLayout:
    """The same from the tensors."""
    batch = source.micro_batch((row,))
    cuts = [0, 160] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    return SequenceLayout(
        segments=tuple(np.diff(cuts).tolist()),
        image_ids=tuple(slot.image_id for slot in batch.images),
        image_starts=tuple(slot.start for slot in batch.images),
    )


def sequences(source: BatchSource) -> list[SequenceMeta]:
    return [row for step in range(3) for row in source.global_batch(step).sequences]


@pytest.mark.parametrize(("packing", "align"), [(True, 1), (True, 4), (True, 16), (False, 1)])
def test_layout_is_what_a_micro_batch_holds(dataset: Dataset, packing: bool, align: int) -> None:
    source = open_source(dataset, packing=packing, align=align)
    rows = sequences(source)
    assert any(len(row.image_ids) > 1 for row in rows) or not packing
    for row in rows:
        assert source.layout(row) == read(source, row)


@pytest.mark.parametrize("align", [1, 8])
def test_layout_of_samples_that_are_cut(dataset: Dataset, align: int) -> None:
    source = open_source(dataset, align=align, algorithm="concat")
    rows = sequences(source)
    assert any(row.pieces for row in rows)
    for row in rows:
        assert source.layout(row) == read(source, row)


def test_another_alignment_is_another_layout(dataset: Dataset) -> None:
    source, other = open_source(dataset, align=4), open_source(dataset, align=8)
    assert any(source.layout(row) != other.layout(row) for row in sequences(source))


def damaged(dataset: Dataset, folder: Path, file: str, offset: int, value: bytes) -> Dataset:
    copy = folder / "copy.gvd"
    shutil.copytree(dataset.path, copy)
    data = bytearray((copy / file).read_bytes())
    data[offset : offset + len(value)] = value
    (copy / file).write_bytes(data)
    return Dataset.open(copy)


@pytest.mark.parametrize(
    ("position", "algorithm"),
    [(None, "balanced"), (2**31, "balanced"), (0, "balanced"), (None, "concat")],
)
def test_a_damaged_sample_keeps_its_layout(
    dataset: Dataset, tmp_path: Path, position: int | None, algorithm: Algorithm
) -> None:
    """Damaged are its tokens, or the position of its second picture: far outside, or before the
    first."""
    with_two = int((dataset.sample_index["n_images"] > 1).argmax())
    record = dataset.sample_index[with_two]
    assert record["n_images"] > 1
    if position is None:
        width = dataset._tokens.dtype.itemsize
        place, value = int(record["tok_off"]) * width, b"\xff"
        broken = damaged(dataset, tmp_path, manifest.TOKENS, place, value)
    else:
        place = (int(record["img_off"]) + 1) * IMAGE_REF.itemsize + 4
        value = position.to_bytes(4, "little")
        broken = damaged(dataset, tmp_path, manifest.IMAGE_REFS, place, value)
    assert broken.crc_problem(with_two)
    source = open_source(broken, align=4, algorithm=algorithm)
    found = [row for row in sequences(source) if with_two in row.sample_ids]
    assert found
    for row in found:
        assert source.layout(row) == read(source, row)
