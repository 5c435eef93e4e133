"""Elements of any cut of a parameter are found in any other, whatever ZeRO made of the parts."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_mega.checkpoint.manifest import ParameterInfo
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.resharding import Part, missing_part, read_part, saved_runs
from ghostvis_mega.model.shards import shard
from ghostvis_mega.utils.errors import CheckpointError
from tests.checkpoint.tiny import CUT_AT, NAME, NORM, NORM_VALUES, WHOLE, part_of, write_tiny

pytestmark = pytest.mark.durability

SHAPE = (16, 24)
NAMES = {
    "decoder.layers.0.mlp.linear_fc1.weight": (0, 2),
    "decoder.layers.0.self_attention.linear_qkv.weight": (0, 1),
    "decoder.layers.0.mlp.linear_fc2.weight": (1, 1),
    "decoder.final_layernorm.weight": (None, 1),
}
PARTS = (1, 2, 4, 8)


def part(whole: torch.Tensor, name: str, *, parts: int, rank: int) -> torch.Tensor:
    gated = NAMES[name][1] == 2
    return shard(whole, name, size=parts, rank=rank, gated=gated).reshape(-1)


class Saved:
    """Parts in memory behind the methods of a reader."""

    def __init__(self, name: str, parts: int):
        dim, stacked = NAMES[name]
        info = ParameterInfo(
            shape=list(SHAPE), dtype="float32", module="llm", partition_dim=dim,
            partition_parts=stacked,
        )  # fmt: skip
        self.whole = torch.arange(16 * 24, dtype=torch.float32).view(SHAPE)
        count = 1 if dim is None else parts
        self.held = [part(self.whole, name, parts=count, rank=rank) for rank in range(count)]
        self.manifest = type("Manifest", (), {"parameters": {name: info}})
        self.elements_read = 0

    def tensor_parts(self, name: str) -> int:
        return len(self.held)

    def read(self, kind: str, name: str, *, tensor_rank: int, start: int, length: int, prefix=""):
        self.elements_read += length
        found = self.held[tensor_rank][start : start + length]
        assert found.numel() == length
        return found


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(NAMES)),
    saved=st.sampled_from(PARTS),
    parts=st.sampled_from(PARTS),
    data=st.data(),
)
def test_every_run_of_every_part_comes_out_of_every_cut(name, saved, parts, data):
    source = Saved(name, saved)
    parts = 1 if NAMES[name][0] is None else parts
    rank = data.draw(st.integers(0, parts - 1))
    expected = part(source.whole, name, parts=parts, rank=rank)
    start = data.draw(st.integers(0, expected.numel() - 1))
    length = data.draw(st.integers(1, expected.numel() - start))
    wanted = Part(rank=rank, parts=parts, start=start, length=length)
    got = read_part(source, "weights", name, wanted)
    assert torch.equal(got, expected[start : start + length])
    if NAMES[name][0] != 1:
        assert source.elements_read == length
    # Columns: whole rows of the parts that hold some of them, and no others.
    assert source.elements_read <= (length + 2 * SHAPE[1]) * max(1, parts)


def test_rows_of_gate_and_up_are_kept_apart():
    source = Saved("decoder.layers.0.mlp.linear_fc1.weight", 2)
    info = source.manifest.parameters["decoder.layers.0.mlp.linear_fc1.weight"]
    whole = Part(rank=0, parts=1, start=0, length=16 * 24)
    runs = list(saved_runs(info, whole, saved=2))
    assert [(run.rank, run.start, run.length) for run in runs] == [
        (0, 0, 96), (1, 0, 96), (0, 96, 96), (1, 96, 96),
    ]  # fmt: skip


def test_over_tensor_ranks_and_zero_fragments_at_once(tmp_path: Path):
    with CheckpointReader(write_tiny(tmp_path / "step-00000003")) as reader:
        moments = -torch.cat([part_of(r).view(2, 2, 6) for r in range(2)], 1).reshape(-1)
        assert torch.equal(-moments, WHOLE.reshape(-1))
        wanted = Part(rank=0, parts=1, start=CUT_AT - 3, length=30)
        got = read_part(reader, "optimizer", NAME, wanted, prefix="exp_avg/")
        assert torch.equal(got, moments[CUT_AT - 3 : CUT_AT + 27])
        norm = Part(rank=0, parts=1, start=2, length=3)
        assert torch.equal(read_part(reader, "weights", NORM, norm), NORM_VALUES[2:5])
        lacking = missing_part(reader, "optimizer", NORM, norm)
        assert lacking is not None and "holds no optimizer of" in lacking
        with pytest.raises(CheckpointError, match="holds no optimizer of"):
            read_part(reader, "optimizer", NORM, norm)
