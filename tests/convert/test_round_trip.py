"""Hugging Face -> ours -> Hugging Face: the same names, shapes, types and bits."""

from pathlib import Path

import pytest
import torch

from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.convert import mapping
from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.compare import compare
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.utils.errors import CheckpointError
from tests.convert.cases import IMAGE, LAYOUTS, MODELS, build, different, save, tensors_of

OPTIONS = ExportOptions(assets=Assets(tokens={"image": IMAGE, "eos": 2, "pad": 0}))


def there_and_back(source: Path, folder: Path, **options) -> Path:
    native = import_hf([source], folder / "native", ImportOptions(**options))
    return export_hf(native, folder / "back", OPTIONS)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_comes_back_bit_for_bit(tmp_path: Path, name: str):
    # The tied ones in fp32, the others as the released weights are.
    dtype = torch.float32 if name.endswith("tied") else torch.bfloat16
    source = save(build(name), tmp_path / "source", dtype=dtype)
    back = there_and_back(source, tmp_path)
    assert different(tensors_of(source), tensors_of(back)) == []
    result = compare(source, back)
    assert result.differences == () and result.tensors == len(tensors_of(source))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_all_three_name_layouts_give_the_canonical_one(tmp_path: Path, layout: str, tower: str):
    model = build(f"llava-{tower}")
    source = save(model, tmp_path / "source", layout=layout, files=3)
    back = there_and_back(source, tmp_path)
    wanted = save(model, tmp_path / "wanted", layout="llava")
    assert different(tensors_of(wanted), tensors_of(back)) == []


def test_many_small_files_hold_the_same(tmp_path: Path):
    source = save(build("llava-siglip"), tmp_path / "source")
    native = import_hf([source], tmp_path / "native", ImportOptions(shard_bytes=40_000))
    assert len(list(native.glob("*.safetensors"))) > 4
    options = ExportOptions(assets=OPTIONS.assets, shard_bytes=40_000)
    back = export_hf(native, tmp_path / "back", options)
    assert (back / "model.safetensors.index.json").is_file()
    assert different(tensors_of(source), tensors_of(back)) == []


def test_a_language_model_and_a_tower_become_one_checkpoint(tmp_path: Path):
    text = save(build("qwen2"), tmp_path / "text", dtype=torch.bfloat16)
    tower = save(build("siglip"), tmp_path / "tower")
    native = import_hf([text, tower], tmp_path / "native", ImportOptions())
    for form, source in (("text", text), ("tower", tower)):
        back = export_hf(native, tmp_path / f"{form}-back", ExportOptions(format=form))
        assert different(tensors_of(source), tensors_of(back)) == []
    with pytest.raises(CheckpointError, match="both hold model.llm"):
        import_hf([text, text], tmp_path / "twice", ImportOptions())


def test_padding_of_the_vocabulary_stays_at_home(tmp_path: Path):
    source = save(build("llava-siglip"), tmp_path / "source")
    native = import_hf([source], tmp_path / "native", ImportOptions(vocab_multiple=64))
    with CheckpointReader(native) as reader:
        for name in ("embedding.weight", "head.weight"):
            padded = reader.weight(name)
            assert padded.shape[0] == 192 and not padded[157:].any() and padded[156].any()
    back = export_hf(native, tmp_path / "back", OPTIONS)
    assert tensors_of(back)["language_model.lm_head.weight"].shape[0] == 157
    assert different(tensors_of(source), tensors_of(back)) == []
    whole = ExportOptions(assets=OPTIONS.assets, vocab_size=192)
    rows = tensors_of(export_hf(native, tmp_path / "whole", whole))
    assert rows["language_model.lm_head.weight"].shape[0] == 192


def test_rounding_is_to_the_nearest(tmp_path: Path):
    source = save(build("llava-siglip-tied"), tmp_path / "source")
    native = import_hf([source], tmp_path / "native", ImportOptions())
    options = ExportOptions(assets=OPTIONS.assets, dtype="bf16")
    rounded = tensors_of(export_hf(native, tmp_path / "bf16", options))
    wanted = {name: t.to(torch.bfloat16) for name, t in tensors_of(source).items()}
    assert different(wanted, rounded) == []
    truncated = {
        name: (t.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
        for name, t in tensors_of(source).items()
    }
    assert len(different(truncated, rounded)) > 20


def test_a_wrong_order_of_rows_does_not_go_unnoticed(tmp_path: Path, monkeypatch):
    """What compares bits must fail where a table of one direction differs from the other's."""
    source = save(build("qwen2"), tmp_path / "source")
    native = import_hf([source], tmp_path / "native", ImportOptions())

    def plain(op, tensors, llm):
        return (mapping.Run(i, 0, mapping.prod(t.shape)) for i, t in enumerate(tensors))

    monkeypatch.setattr(mapping, "_runs", plain)
    back = export_hf(native, tmp_path / "back", OPTIONS)
    wrong = different(tensors_of(source), tensors_of(back))
    assert len(wrong) == 3 * 6 and all("self_attn" in name for name in wrong)
    assert {d.name.split(".", 2)[2] for d in compare(source, back).differences} == {
        name.removeprefix("model.") for name in wrong
    }
