"""Checkpoints of every layout export the same bytes, and so do engines while they run.

Four gloo ranks go through all layouts in one launch; each test looks at one of their results.
"""

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.convert.exporter import export_hf
from ghostvis_mega.convert.native import NativeWeights
from tests.convert.cases import different, tensors_of
from tests.convert.sharded import (
    FORMS,
    IMAGE,
    NEW_TOKENS,
    PADDED,
    PROMPTS,
    VOCAB,
    pictures,
    prepare,
    prepare_form,
)
from tests.convert.worker import CASES, OPTIONS, SPLITS, form_options
from tests.launch import launch

pytestmark = pytest.mark.world_size(4)
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def stock(folder: Path) -> dict[str, Any]:
    return {kind: prepare(kind, folder) for kind in ("untied", "tied")} | {
        kind: prepare_form(kind, folder) for kind in FORMS
    }


@pytest.fixture(scope="module")
def results(stock, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("worker.py")
    return launch(
        worker, ranks=1, timeout_s=250, folder=tmp_path_factory.mktemp("launch"), args=[str(folder)]
    )


@pytest.mark.parametrize("kind", FORMS)
def test_models_of_every_form_export_the_same_bytes_from_every_layout(
    results, stock, folder: Path, tmp_path: Path, kind: str
):
    options, first = form_options(kind), None
    for split in SPLITS:
        name = f"{kind}-{split}"
        out = export_hf(Path(results[name]["saved"]), tmp_path / name, options)
        assert json.loads((out / "ghostvis_export.json").read_text())["format"] == FORMS[kind]
        assert different(tensors_of(stock[kind]), tensors_of(out)) == [], name
        online = folder / f"{name}-online"
        files = sorted(path.name for path in out.iterdir())
        assert files == sorted(path.name for path in online.iterdir())
        assert filecmp.cmpfiles(out, online, files, shallow=False) == (files, [], []), name
        weights = (out / "model.safetensors").read_bytes()
        first = first or weights
        assert weights == first, name


def kind_of(name: str) -> str:
    return "tied" if name.startswith("tied") else "untied"


@pytest.mark.parametrize("name", NAMES)
def test_what_was_imported_comes_back_from_every_layout(results, stock, tmp_path: Path, name: str):
    out = export_hf(Path(results[name]["saved"]), tmp_path / "out", OPTIONS)
    _, source = stock[kind_of(name)]
    assert different(tensors_of(source), tensors_of(out)) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_answers_as_transformers_does(results, stock, name: str):
    model, _ = stock[kind_of(name)]
    assert results[name]["answers"] == [greedy(model, tokens, ids) for tokens, ids in PROMPTS]


def greedy(model: Any, tokens: list[int], ids: tuple[int, ...]) -> list[int]:
    """transformers' own answer."""
    expanded = [t for token in tokens for t in [token] * (16 if token == IMAGE else 1)]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([expanded])}
    if ids:
        inputs["pixel_values"] = (pictures()[list(ids)].float() - 127.5) / 127.5
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    answer = out[0, len(expanded) :].tolist()
    return answer[: answer.index(2)] if 2 in answer else answer


@pytest.mark.parametrize("step", ["saved", "trained"])
@pytest.mark.parametrize("name", NAMES)
def test_the_running_engine_exports_what_its_checkpoint_does(
    results, folder: Path, tmp_path: Path, name: str, step: str
):
    offline = export_hf(Path(results[name][step]), tmp_path / "offline", OPTIONS)
    online = folder / (f"{name}-online" if step == "saved" else f"{name}-trained-online")
    files = sorted(path.name for path in offline.iterdir())
    assert files == sorted(path.name for path in online.iterdir())
    assert filecmp.cmpfiles(offline, online, files, shallow=False) == (files, [], [])


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_layouts_export_byte_for_byte_the_same_file(results, folder: Path, kind: str):
    first, *others = [name for name in NAMES if kind_of(name) == kind]
    one = (folder / f"{first}-online" / "model.safetensors").read_bytes()
    for name in others:
        assert (folder / f"{name}-online" / "model.safetensors").read_bytes() == one, name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dp4"])
def test_a_step_of_training_changes_the_export_alike_in_all_layouts(
    results, folder: Path, name: str
):
    first = "tied-dp4" if kind_of(name) == "tied" else "dp4"
    before = load_file(folder / f"{first}-online" / "model.safetensors")
    wanted = load_file(folder / f"{first}-trained-online" / "model.safetensors")
    found = load_file(folder / f"{name}-trained-online" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for tensor in wanted:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-4, atol=1e-5)
    moved = [t for t in wanted if not torch.equal(before[t], wanted[t])]
    assert len(moved) > 60


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_zero_and_stays_zero_in_every_layout(results, name: str):
    for step in ("saved", "trained"):
        with CheckpointReader(Path(results[name][step])) as reader:
            for table in ("embedding.weight", "head.weight"):
                if table in reader.manifest.parameters:
                    rows = reader.weight(table)
                    assert len(rows) == PADDED and rows[:VOCAB].any() and not rows[VOCAB:].any()


def test_tied_models_have_no_head_of_their_own(results, folder: Path):
    for name in NAMES:
        names = load_file(folder / f"{name}-trained-online" / "model.safetensors").keys()
        assert ("language_model.lm_head.weight" in names) == (kind_of(name) == "untied")


def test_joining_parts_of_ranks_in_the_wrong_way_is_noticed(results, tmp_path: Path, monkeypatch):
    """The classic faults: gate and up as if they were one matrix; columns as if they were rows."""
    path = Path(results["tp2-pp2"]["saved"])
    right = tensors_of(export_hf(path, tmp_path / "right", OPTIONS))
    described = NativeWeights.__init__

    def change(field: str, value: int, suffix: str):
        def init(self, path, **options):
            described(self, path, **options)
            for name, info in self.manifest.parameters.items():
                if name.endswith(suffix):
                    self.manifest.parameters[name] = info.model_copy(update={field: value})

        return init

    for field, value, suffix, part in (
        ("partition_parts", 1, "linear_fc1.weight", "gate_proj"),
        ("partition_dim", 0, "linear_fc2.weight", "down_proj"),
    ):
        monkeypatch.setattr(NativeWeights, "__init__", change(field, value, suffix))
        wrong = tensors_of(export_hf(path, tmp_path / field, OPTIONS))
        named = different(right, wrong)
        assert named and any(part in name for name in named)


def test_a_failure_of_one_rank_is_told_on_all(results, folder: Path):
    told = results["tp2-pp2"]["failures"]
    for name, sentence in (
        ("existing", "tp2-pp2-online exists already"),
        ("format", "--format gguf is unknown"),
        ("disk", "No space left on device"),
        ("none", "accepted"),
    ):
        assert len(told[name]) == 4 and len(set(told[name])) == 1
        assert sentence in told[name][0]
    assert (folder / "new").exists()
    assert not (folder / "another").exists() and not (folder / "another.tmp").exists()
