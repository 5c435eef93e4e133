"""What delayed FP8 scaling remembers is found by the layer's number in the whole model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ghostvis_mega.checkpoint import fp8_state
from ghostvis_mega.checkpoint.manifest import write_manifest
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.tensors import write_tensors
from ghostvis_mega.model.llm import LLMChunk
from tests.checkpoint.tiny import write_tiny


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


def test_other_recipes_remember_nothing():
    assert fp8_state.capture_fp8_state([FakeChunk({0: 1.0}, recipe="tensorwise")]) == []


def test_the_reader_collects_layers_over_the_files_of_all_ranks(tmp_path: Path):
    path = write_tiny(tmp_path / "step-00000003")
    document = json.loads((path / "manifest.json").read_text())
    for rank, layers in ((1, "ab"), (2, "bc")):
        name = f"random-{rank:05d}.safetensors"
        tensors = [(f"fp8/{layer}/scale", torch.tensor([float(rank)])) for layer in layers]
        size, digest = write_tensors(path / name, tensors, metadata={})
        entry = {"bytes": size, "sha256": digest, "kind": "random", "rank": rank}
        document["files"][name] = entry | {"tensor_rank": 0, "slices": {}}
    write_manifest(path, document)
    with CheckpointReader(path) as reader:
        found = {name: tensor.item() for name, tensor in reader.fp8_state().items()}
    assert found == {"fp8/a/scale": 1.0, "fp8/b/scale": 1.0, "fp8/c/scale": 2.0}
