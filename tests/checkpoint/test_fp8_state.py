"""What delayed FP8 scaling remembers is found by the layer's number in the whole model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ghostvis_mega.checkpoint import fp8_state, store
from ghostvis_mega.checkpoint.manifest import write_manifest
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.rewrite import Target, reshard
from ghostvis_mega.checkpoint.tensors import write_tensors
from ghostvis_mega.config.schema import ParallelConfig
from ghostvis_mega.model.llm import LLMChunk
from tests.checkpoint.tiny import with_moments, write_tiny

pytestmark = pytest.mark.durability


class FakeLinear(nn.Module):
    """Has what Transformer Engine's modules have once they ran."""

    def __init__(self, value: float | None):
        super().__init__()
        self.config = SimpleNamespace()
        self.fp8_meta: dict = {}
        if value is not None:
            self.init_fp8_meta_tensors(None)
            for number, direction in enumerate(("scaling_fwd", "scaling_bwd")):
                self.fp8_meta[direction].scale.fill_(value + number / 4)
                self.fp8_meta[direction].amax_history.fill_(-value - number / 4)

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        for direction in ("scaling_fwd", "scaling_bwd"):
            self.fp8_meta[direction] = SimpleNamespace(
                scale=torch.ones(3), amax_history=torch.zeros(4, 3)
            )


class FakeChunk(nn.Module):
    """Some layers of a model; `None` as a value: newly built."""

    global_name = LLMChunk.global_name

    def __init__(self, values: dict[int, float | None], *, recipe: str = "delayed"):
        super().__init__()
        self.config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList()
        for number, value in values.items():
            layer = nn.Module()
            layer.layer_number = number + 1
            layer.linear = FakeLinear(value)
            self.decoder.layers.append(layer)

    def values(self) -> list[list[float]]:
        return [
            [meta[d].scale[0].item() for d in ("scaling_fwd", "scaling_bwd")]
            + [meta["scaling_fwd"].amax_history[0, 0].item()]
            for meta in (layer.linear.fp8_meta for layer in self.decoder.layers)
        ]


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_state, "get_fp8_recipe", lambda config: None)


EXPECTED = {number: [number + 1.0, number + 1.25, -(number + 1.0)] for number in range(4)}


def saved(*stages: dict[int, float | None]) -> dict[str, torch.Tensor]:
    chunks = [FakeChunk(stage) for stage in stages]
    return {k: v for chunk in chunks for k, v in fp8_state.capture_fp8_state([chunk])}


@pytest.mark.parametrize("layers", [[0, 1], [1, 3], [0, 1, 2, 3]])
def test_any_stage_finds_its_layers_among_those_of_others(
    layers: list[int], caplog: pytest.LogCaptureFixture
):
    everything = saved({0: 1.0, 1: 2.0}, {2: 3.0, 3: 4.0})
    chunk = FakeChunk(dict.fromkeys(layers))
    fp8_state.restore_fp8_state([chunk], everything, of_all_ranks=True)
    assert chunk.values() == [EXPECTED[number] for number in layers]
    assert not caplog.records


def test_a_rank_of_the_same_place_takes_its_own_and_says_what_is_too_much(
    caplog: pytest.LogCaptureFixture,
):
    chunk = FakeChunk({2: None})
    fp8_state.restore_fp8_state([chunk], saved({2: 3.0, 3: 4.0}))
    assert chunk.values() == [EXPECTED[2]]
    assert "FP8 scales of fp8/decoder.layers.3.linear" in caplog.text


def test_a_checkpoint_without_scales_is_a_warning_where_some_are_needed(
    caplog: pytest.LogCaptureFixture,
):
    fp8_state.restore_fp8_state([FakeChunk({0: None}, recipe="tensorwise")], {}, of_all_ranks=True)
    assert not caplog.records
    fp8_state.restore_fp8_state([FakeChunk({0: None})], {"torch/cpu": torch.zeros(1)})
    assert caplog.text.count("the checkpoint holds no FP8 scales") == 1


def test_other_recipes_remember_nothing():
    assert fp8_state.capture_fp8_state([FakeChunk({0: 1.0}, recipe="tensorwise")]) == []


def add_random(path: Path, rank: int, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """What a rank remembers, into a checkpoint."""
    document = json.loads((path / "manifest.json").read_text())
    name = CheckpointReader.random_file(rank)
    (path / name).unlink(missing_ok=True)
    size, digest = write_tensors(path / name, tensors, metadata={"python": "{}"})
    entry = {"bytes": size, "sha256": digest, "kind": "random", "rank": rank}
    document["files"][name] = entry | {"tensor_rank": 0, "slices": {}}
    write_manifest(path, document)


def test_the_reader_collects_layers_over_the_files_of_all_ranks(tmp_path: Path):
    path = write_tiny(tmp_path / "step-00000003")
    for rank, layers in ((1, "ab"), (2, "bc")):
        add_random(path, rank, [(f"fp8/{n}/scale", torch.tensor([float(rank)])) for n in layers])
    with CheckpointReader(path) as reader:
        found = {name: tensor.item() for name, tensor in reader.fp8_state().items()}
    assert found == {"fp8/a/scale": 1.0, "fp8/b/scale": 1.0, "fp8/c/scale": 2.0}


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_a_checkpoint_cut_anew_has_the_scales_of_each_rank_in_its_file(
    tmp_path: Path, pipeline: int, monkeypatch: pytest.MonkeyPatch
):
    source = with_moments(write_tiny(tmp_path / "step-00000003"), num_layers=4)
    everything = saved({0: 1.0, 1: 2.0}, {2: 3.0, 3: 4.0})
    add_random(source, 0, [*saved({0: 1.0, 1: 2.0}).items(), ("torch/cpu", torch.zeros(9))])
    add_random(source, 1, [*saved({2: 3.0, 3: 4.0}).items(), ("torch/cpu", torch.ones(9))])
    out = tmp_path / "out"
    parallel = ParallelConfig(pipeline=pipeline)
    reshard(source, out, Target(parallel, world_size=2 * pipeline))
    each = 4 // pipeline
    with CheckpointReader(out) as reader:
        assert reader.damage(reader.files()) == []
        assert reader.fp8_state().keys() == everything.keys()
        for rank in range(2 * pipeline):
            tensors, texts = reader.random_state(rank)
            assert "torch/cpu" not in tensors and not texts
            first = rank // 2 * each
            assert restored(reader, rank, range(first, first + each), monkeypatch).values() == [
                EXPECTED[n] for n in range(first, first + each)
            ]


def restored(
    reader: CheckpointReader, rank: int, layers: range, monkeypatch: pytest.MonkeyPatch
) -> FakeChunk:
    """The model of a rank that resumes in the layout of the checkpoint."""
    chunk = FakeChunk(dict.fromkeys(layers))
    engine = SimpleNamespace(
        groups=SimpleNamespace(rank=rank), parts=SimpleNamespace(chunks=[chunk])
    )
    monkeypatch.setattr(store, "layout_of", lambda engine: reader.manifest.layout)
    store._restore_own(engine, reader)
    return chunk
