"""INT8 and FP8 directories load in transformers and compute what the rounded numbers say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.convert.compare import damage
from ghostvis_mega.convert.divergence import load_model
from ghostvis_mega.convert.exporter import export_hf
from ghostvis_mega.convert.hf_folder import HFFolder
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.convert.quantize import check_plain, quantize_hf
from ghostvis_mega.convert.schemes import (
    DEFAULT_SKIP,
    SCHEMES,
    is_skipped,
    patterns,
    quantize_model_int8,
)
from ghostvis_mega.generate.weights import open_model
from ghostvis_mega.utils.errors import CheckpointError
from tests.convert.cases import IMAGE, build, different, save, tensors_of
from tests.convert.test_stock_programs import OPTIONS, PROMPTS, inputs_of

NAMES = ("qwen2", "llava-siglip", "llava-siglip-tied", "perceiver-siglip")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = save(build(name), folder / name)
            return self[name]

    return Made()


def load_compressed(path: Path, name: str, **options: Any):
    kind = AutoModelForCausalLM if name == "qwen2" else AutoModelForImageTextToText
    options = {"dtype": torch.float32, **options}
    model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], f"{key}: {info[key]}"
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # compressed-tensors' and its dependencies'
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("name", ["qwen2", "llava-siglip", "llava-siglip-tied"])
def test_transformers_computes_the_fake_quantised_numbers(
    sources, tmp_path: Path, name: str, scheme: str
):
    done = quantize_hf(sources[name], tmp_path / "out", scheme=scheme)
    assert len(done.layers) == 3 * 7
    loaded = load_compressed(tmp_path / "out", name)
    plain, reference = load_model(sources[name]), load_model(sources[name])
    assert len(quantize_model_int8(reference, scheme=scheme)) == 3 * 7
    for tokens, ids in PROMPTS[:1] if name == "qwen2" else PROMPTS:
        inputs = inputs_of(tokens, ids, 16, "x-siglip")
        with torch.no_grad():
            found, wanted = loaded(**inputs).logits, reference(**inputs).logits
            other = plain(**inputs).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        # Neither the plain model nor one whose inputs stay as they are passes for it.
        assert (other - wanted).abs().max() > 1e-3


def logits_of(model, width: int) -> torch.Tensor:
    """Of all prompts, one after the other, in fp32."""
    found = []
    for tokens, ids in PROMPTS:
        inputs = inputs_of(tokens, ids, width, "x-siglip")
        if ids:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.no_grad():
            found.append(model(**inputs).logits[0].float())
    return torch.cat(found)


def kl(one: torch.Tensor, other: torch.Tensor) -> float:
    p, q = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_bf16_copy_of_our_own_format_loads_with_its_code(tmp_path: Path, scheme: str):
    source = save(build("perceiver-siglip"), tmp_path / "source")
    native = import_hf([source], tmp_path / "native", ImportOptions())
    export = export_hf(native, tmp_path / "export", replace(OPTIONS, dtype="bf16"))
    quantize_hf(export, tmp_path / "out", scheme=scheme)
    plain, reference = load_model(export), load_model(export)
    quantize_model_int8(reference, scheme=scheme)
    before, wanted = logits_of(plain, 9), logits_of(reference, 9)
    loaded = load_compressed(tmp_path / "out", "perceiver-siglip", trust_remote_code=True)
    assert "transformers_modules" in type(loaded).__module__
    torch.testing.assert_close(logits_of(loaded, 9), wanted, rtol=0, atol=1e-5)
    assert (before - wanted).abs().max() > 1e-2
    # As it is loaded and served: scales are rounded to BF16 as well, so it is no longer the
    # reference, but as far from the model that it is made of.
    loaded = load_compressed(
        tmp_path / "out", "perceiver-siglip", dtype="auto", trust_remote_code=True
    )
    scales = {n: t for n, t in loaded.state_dict().items() if n.endswith("weight_scale")}
    assert len(scales) == 3 * 7 and {t.dtype for t in scales.values()} == {torch.bfloat16}
    printed, moved = kl(before, wanted), kl(before, logits_of(loaded, 9))
    assert printed / 2 < moved < 2 * printed
    # Neither BF16 alone nor one wrong matrix is so far.
    assert kl(before, logits_of(plain.to(torch.bfloat16), 9)) < printed / 2
    loaded.get_submodule("model.language_model.layers.1.mlp.down_proj").weight.mul_(1.5)
    assert kl(before, logits_of(loaded, 9)) > 2 * printed


@pytest.mark.filterwarnings("ignore")
def test_rounding_the_weights_alone_is_not_enough(sources, tmp_path: Path, monkeypatch):
    quantize_hf(sources["qwen2"], tmp_path / "out", scheme="int8")
    loaded = load_compressed(tmp_path / "out", "qwen2")
    reference = load_model(sources["qwen2"])
    quantize_model_int8(reference)
    scheme = SCHEMES["int8"]
    monkeypatch.setattr(type(scheme), "inputs", lambda self, x: x)
    with torch.no_grad():
        tokens = torch.tensor([PROMPTS[0][0]])
        assert (loaded(tokens).logits - reference(tokens).logits).abs().max() > 1e-4


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("name", NAMES)
def test_files_hold_the_rounded_rows_and_all_else_as_it_was(
    sources, tmp_path: Path, name: str, scheme: str
):
    out = tmp_path / "out"
    done = quantize_hf(sources[name], out, scheme=scheme, shard_bytes=50_000)
    assert damage(out) == []
    before, after = tensors_of(sources[name]), tensors_of(out)
    chosen = SCHEMES[scheme]
    rounded = {layer.name for layer in done.layers}
    assert all(".layers." in n and "_proj" in n and "vision" not in n for n in rounded)
    kept = {n: t for n, t in after.items() if n not in rounded and not n.endswith("_scale")}
    assert different({n: t for n, t in before.items() if n not in rounded}, kept) == []
    for n in rounded:
        q, scale = after[n], after[f"{n}_scale"]
        assert q.dtype == chosen.dtype and scale.shape == (q.shape[0], 1)
        error = (q.float() * scale - before[n]).abs()
        half = scale / 2 if scheme == "int8" else before[n].abs() / 16 + scale
        assert bool((error <= half * 1.0001).all())
        assert q.float().abs().amax(dim=1).min() == chosen.largest
    noise = [layer.signal_to_noise_db for layer in done.layers]
    assert min(noise) > (35 if scheme == "int8" else 28)
    assert done.bytes_after < done.bytes_before


def test_the_streamed_rows_are_those_of_the_whole_matrix(sources, tmp_path: Path, monkeypatch):
    from ghostvis_mega.convert import quantize

    quantize_hf(sources["qwen2"], tmp_path / "whole", scheme="int8")
    monkeypatch.setattr(quantize, "CHUNK_BYTES", 4000)
    quantize_hf(sources["qwen2"], tmp_path / "rows", scheme="int8")
    assert different(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "rows")) == []


def test_skipped_modules_stay_and_are_written_down(sources, tmp_path: Path):
    from compressed_tensors.utils.match import match_name

    source = sources["llava-siglip"]
    skip = (*DEFAULT_SKIP, "*layers.0.*", "*down_proj")
    done = quantize_hf(source, tmp_path / "out", scheme="int8", skip_modules=skip)
    names = {layer.name for layer in done.layers}
    assert len(names) == 2 * 6
    assert not any("layers.0." in name or "down_proj" in name for name in names)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert list(patterns(skip)) == config["ignore"]
    for pattern, module, inside in (
        ("*down_proj", "model.language_model.layers.1.mlp.down_proj", True),
        ("*down_proj", "model.language_model.layers.1.mlp.up_proj", False),
        ("re:.*lm_head", "lm_head", True),
        ("lm_head", "language_model.lm_head", False),
        ("*layers.1", "model.layers.1.mlp.up_proj", True),
        ("*layers.1", "model.layers.11.mlp.up_proj", False),
        ("*layers.?", "model.layers.12.mlp.up_proj", False),
        ("*.up", "model.layers.1.mlp.up_proj", False),
        ("re:.*layers.1", "model.layers.11.mlp.up_proj", True),
    ):
        assert is_skipped(module, patterns([pattern])) is inside
        (written,) = patterns([pattern])
        assert match_name(module, written) is inside
    everything = quantize_hf(source, tmp_path / "all", scheme="int8", skip_modules=())
    names = {layer.name for layer in everything.layers}
    assert any("lm_head" in n for n in names) and any("vision_tower" in n for n in names)
    assert not any("embed" in n for n in names)


def test_a_zero_row_stays_zero():
    for scheme in SCHEMES.values():
        quantised, scale = scheme.weight(torch.zeros(2, 3))
        assert bool((quantised.float() * scale == 0).all()) and bool((scale > 0).all())
        assert bool((scheme.inputs(torch.zeros(2, 3)) == 0).all())


def test_what_cannot_be_quantised_is_refused(sources, tmp_path: Path):
    source = sources["qwen2"]
    quantize_hf(source, tmp_path / "out", scheme="fp8")
    for arguments, told in (
        ((source, "int4", ()), "--scheme int4 is unknown: use int8 or fp8"),
        ((tmp_path / "out", "int8", ()), "is quantised already"),
        ((source, "int8", ("*",)), "--skip leaves no linear layer"),
        ((source, "int8", ("*.nothing", "*lm_head")), r"--skip \*\.nothing matches no linear"),
        ((source, "int8", ("re:(",)), "--skip re:.* is no pattern"),
        ((tmp_path, "int8", ()), "holds no .*safetensors"),
    ):
        path, scheme, skip = arguments
        with pytest.raises(CheckpointError, match=told):
            quantize_hf(path, tmp_path / "new", scheme=scheme, skip_modules=skip)
        assert not (tmp_path / "new").exists()


def test_the_command_prints_size_noise_and_divergence(sources, tmp_path: Path):
    source, out = sources["llava-siglip"], tmp_path / "out"
    arguments = ["convert", "quantize", str(source), "--out", str(out), "--scheme", "int8"]
    result = CliRunner().invoke(app, [*arguments, "--samples", "2", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 0 and 0 < rows["logits KL"]["value"] < 0.02
    assert rows["size after"]["value"] < rows["size before"]["value"]
    assert rows["layers quantised"]["value"] == 21
    strict = ["--force", "--samples", "2", "--bar", "1e-12"]
    assert CliRunner().invoke(app, [*arguments, *strict]).exit_code == 1
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_data_that_cannot_be_read_is_told_before_anything_is_written(
    sources, tmp_path: Path, easy_vqa: Path
):
    command = ["convert", "quantize", str(sources["qwen2"]), "--out", str(tmp_path / "out")]
    for more, told in (
        (["--data", str(tmp_path / "none.gvd")], "none.gvd"),
        (["--data", str(easy_vqa / "train.gvd")], "it is another model's dataset"),
        (["--data", "x", "--samples", "0"], "is for the KL"),
    ):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 2 and told in result.output
        assert list(tmp_path.iterdir()) == []


def test_a_tower_has_no_predictions_to_measure(sources, tmp_path: Path):
    source, out = save(build("siglip"), tmp_path / "tower"), tmp_path / "out"
    command = ["convert", "quantize", str(source), "--out", str(out), "--skip", "*fc1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "give --samples 0" in result.output
    assert not out.exists()
    assert CliRunner().invoke(app, [*command, "--samples", "0"]).exit_code == 0
    assert damage(out) == []


def test_a_quantised_copy_is_refused_where_floating_point_is_read(sources, tmp_path: Path):
    out = tmp_path / "out"
    quantize_hf(sources["qwen2"], out, scheme="int8")
    told = "is quantised already .*take the model that it is made of"
    with pytest.raises(CheckpointError, match=told), open_model(out):
        pass
    with pytest.raises(CheckpointError, match=told):
        import_hf([out], tmp_path / "native", ImportOptions())
    assert list(tmp_path.iterdir()) == [out]


def test_a_quantised_language_model_inside_is_refused_as_well(sources, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(sources["llava-siglip"], source)
    settings = json.loads((source / "config.json").read_text())
    for value, refused in ((None, False), ({"quant_method": "fp8"}, True)):
        settings["text_config"]["quantization_config"] = value
        (source / "config.json").write_text(json.dumps(settings))
        with HFFolder(source) as folder:
            if refused:
                with pytest.raises(CheckpointError, match=r"\(text_config.quantization_config in"):
                    check_plain(folder)
            else:
                check_plain(folder)


def test_image_tokens_are_never_among_random_prompts(sources):
    from ghostvis_mega.convert.divergence import _random

    tokens = torch.cat([s["input_ids"] for s in _random(sources["llava-siglip"], 20)])
    assert not bool((tokens == IMAGE).any()) and bool((tokens == IMAGE + 1).any())
