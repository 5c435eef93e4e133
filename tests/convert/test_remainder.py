"""Towers whose patches do not fill the picture, such as SigLIP of 384 pixels in patches of 14."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from ghostvis_mega.convert.exporter import export_hf
from ghostvis_mega.convert.hf_config import processor_patches
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.convert.mapping import Parts
from ghostvis_mega.generate.load import load_model
from ghostvis_mega.model.flops import batch_flops
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.errors import CheckpointError
from tests.convert import cases
from tests.convert.cases import CPU, IMAGE, build, different, save, tensors_of
from tests.convert.native_model import NativeModel
from tests.convert.test_stock_programs import OPTIONS, expand, load, normalised, pictures
from tests.model.test_flops import counted_vision

SIDE = 18
"""Of pictures in patches of 4: the last two columns and rows belong to none."""
PROMPT = [IMAGE, 8, IMAGE, 19, 23, 77]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.TOWER, "image_size", SIDE)


@pytest.mark.parametrize("name", ["llava-siglip", "llava-clip", "avgpool-siglip-norm"])
def test_scores_gradients_and_pictures_are_those_of_transformers(
    wide, groups: Groups, tmp_path: Path, name: str
):
    model: Any = build(name)
    source = save(model, tmp_path / "source")
    native = import_hf([source], tmp_path / "native", ImportOptions())
    ours, pixels = NativeModel(native, groups), pictures(SIDE)[:2]
    assert ours.encoder is not None
    width = ours.config.tokens_per_image
    with torch.no_grad():
        inputs = {"input_ids": expand(PROMPT, width), "pixel_values": normalised(pixels, name)}
        wanted = model(**inputs).logits[0]
    found = ours.logits(PROMPT, pixels, image=IMAGE)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    # What is dropped is right and below, and nothing else.
    for rows, seen in ((slice(-2, None), False), (slice(0, 2), True)):
        other = pixels.clone()
        other[:, :, rows, rows] ^= 255
        moved = (ours.logits(PROMPT, other, image=IMAGE) - found).abs().max()
        assert (moved > 1e-3) if seen else (moved == 0)

    theirs = model.model
    for encoded in (
        torch.stack(list(theirs.get_image_features(normalised(pixels, name)).pooler_output)),
        ours.encoder(pixels),
    ):
        encoded.square().sum().backward()
    stock = theirs.vision_tower.embeddings
    for one, other in (
        (ours.encoder.tower.embeddings.patch_embedding.weight, stock.patch_embedding.weight),
        (ours.encoder.tower.embeddings.position_embedding.weight, stock.position_embedding.weight),
    ):
        assert one.grad is not None and one.grad.abs().max() > 1e-3
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)

    parts = {"vision", "resampler", "projector"}
    flops = batch_flops(ours.config, segments=[8], head_rows=8, num_images=3, trained=parts)
    assert (flops.vision.forward, flops.vision.backward) == counted_vision(ours.config, parts, 3)

    out = export_hf(native, tmp_path / "out", OPTIONS)
    assert different(tensors_of(source), tensors_of(out)) == []
    assert json.loads((out / "config.json").read_text())["vision_config"]["image_size"] == SIDE
    picture = Image.fromarray(pictures(40)[0].permute(1, 2, 0).numpy())
    png = io.BytesIO()
    picture.save(png, format="PNG")
    prepared = AutoImageProcessor.from_pretrained(out)(images=[picture], return_tensors="pt")
    assert prepared["pixel_values"].shape == (1, 3, SIDE, SIDE)
    exported = load(AutoModelForImageTextToText, out, name).model
    with torch.no_grad():
        (wanted,) = exported.get_image_features(prepared["pixel_values"]).pooler_output
    answering = load_model(out, device=CPU, dtype=torch.float32).pictures
    assert answering is not None and wanted.shape[0] == width
    torch.testing.assert_close(answering([png.getvalue()])[0], wanted, rtol=0, atol=2e-5)
    step, extra, strategy = processor_patches(Parts.of(ours.config), name.split("-")[0])
    assert (SIDE // step) ** 2 + extra - (strategy == "default") == width


def test_a_size_that_is_asked_for_leaves_none(wide, tmp_path: Path):
    source = save(build("siglip"), tmp_path / "source")
    import_hf([source], tmp_path / "own", ImportOptions(image_size=SIDE))
    with pytest.raises(CheckpointError, match="--image-size 19 .*use 16 or 20, or .* own 18$"):
        import_hf([source], tmp_path / "new", ImportOptions(image_size=19))
    narrow = import_hf([source], tmp_path / "narrow", ImportOptions(image_size=16))
    # The same patches, so the same table.
    out = export_hf(narrow, tmp_path / "out", OPTIONS)
    assert different(tensors_of(source), tensors_of(out)) == []
