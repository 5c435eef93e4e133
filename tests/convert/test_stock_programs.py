"""Stock transformers loads every export and computes what we compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from ghostvis_mega.convert import mapping
from ghostvis_mega.convert.assets import Assets, find_assets, write_assets
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.hf_config import processor_patches
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.convert.mapping import Parts
from ghostvis_mega.data.tokenizer import train_tokenizer
from ghostvis_mega.model.vision_tower import VisionTower
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.errors import CheckpointError
from tests.convert.cases import IMAGE, TEXTS, VLMS, build, save
from tests.convert.native_model import NativeModel

OPTIONS = ExportOptions(assets=Assets(tokens={"image": IMAGE, "eos": 2, "pad": 0}))
PROMPTS: list[tuple[list[int], tuple[int, ...]]] = [
    ([7, 30, 41, 9, 100, 64], ()),
    ([7, IMAGE, 30, 41], (0,)),
    ([IMAGE, 8, IMAGE, 19, 23, IMAGE, 77], (2, 1, 0)),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(checkpoint, export) by name; made when first asked for."""
    folder = tmp_path_factory.mktemp("exports")

    class Made(dict):
        def __missing__(self, name: str) -> tuple[Path, Path]:
            source = save(build(name), folder / name)
            native = import_hf([source], folder / f"{name}-native", ImportOptions())
            self[name] = native, export_hf(native, folder / f"{name}-out", OPTIONS)
            return self[name]

    return Made()


def load(kind: Any, path: Path, name: str) -> Any:
    """A model, of which not one tensor was missing or too much."""
    own = name.split("-")[0] in ("perceiver", "avgpool")
    model, info = kind.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", trust_remote_code=own
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[key], f"{key}: {info[key]}"
    return model.eval()


def pictures(size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)


def normalised(pixels: torch.Tensor, name: str) -> torch.Tensor:
    statistics = {
        "siglip": ([0.5] * 3, [0.5] * 3),
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    }
    mean, std = (torch.tensor(x)[:, None, None] for x in statistics[name.split("-")[1]])
    return (pixels.float() / 255 - mean) / std


def expand(tokens: list[int], width: int) -> torch.Tensor:
    return torch.tensor([[t for x in tokens for t in [x] * (width if x == IMAGE else 1)]])


def inputs_of(tokens: list[int], ids: tuple[int, ...], width: int, name: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": expand(tokens, width)}
    if ids:
        inputs["pixel_values"] = normalised(pictures()[list(ids)], name)
    return inputs


@pytest.mark.parametrize("name", VLMS)
def test_a_vision_language_model_scores_and_answers_alike(exports, groups: Groups, name: str):
    native, out = exports[name]
    ours, theirs = NativeModel(native, groups), load(AutoModelForImageTextToText, out, name)
    width = ours.config.tokens_per_image
    for tokens, ids in PROMPTS:
        pixels = pictures()[list(ids)] if ids else None
        inputs = inputs_of(tokens, ids, width, name)
        with torch.no_grad():
            wanted = theirs(**inputs).logits[0]
        found = ours.logits(tokens, pixels, image=IMAGE)
        assert wanted.std() > 0.05
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        out_ids = theirs.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
        assert out_ids == ours.greedy(tokens, pixels, image=IMAGE, count=4)
        again = theirs.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
        assert again == out_ids


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_model_scores_and_answers_alike(exports, groups: Groups, name: str):
    native, out = exports[name]
    ours, theirs = NativeModel(native, groups), load(AutoModelForCausalLM, out, name)
    tokens = [7, 30, 41, 9, 100, 64]
    with torch.no_grad():
        wanted = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(ours.logits(tokens), wanted, rtol=0, atol=1e-5)
    answer = theirs.generate(
        torch.tensor([tokens]), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert answer[0, 6:].tolist() == ours.greedy(tokens, count=4)


def hidden_states(tower: VisionTower, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Before the first layer and after each, as transformers lists them."""
    x_NPC = tower.embeddings(pixels)
    found = [x_NPC if tower.pre_layrnorm is None else tower.pre_layrnorm(x_NPC)]
    for layer in tower.encoder.layers:
        found.append(layer(found[-1]))
    return found


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_a_tower_gives_the_same_features(exports, name: str):
    from ghostvis_mega.checkpoint.reader import CheckpointReader
    from ghostvis_mega.convert.native import parts_of_layout

    native, out = exports[name]
    theirs = load(AutoModel, out, name)
    with CheckpointReader(native) as reader:
        vision = parts_of_layout(reader.manifest.layout, native).vision
        assert vision is not None
        ours = VisionTower(vision)
        with torch.no_grad():
            for parameter_name, parameter in ours.named_parameters():
                parameter.copy_(reader.weight(f"tower.{parameter_name}"))
    pixels = normalised(pictures(), f"x-{name}")
    with torch.no_grad():
        wanted = theirs(pixels, output_hidden_states=True).hidden_states
        found = hidden_states(ours, pixels)
    assert len(found) == len(wanted) == 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llava-siglip", "perceiver-siglip", "avgpool-siglip-norm"])
def test_every_stage_of_the_vision_side_is_the_same(exports, groups: Groups, name: str):
    native, out = exports[name]
    ours = NativeModel(native, groups).encoder
    theirs = load(AutoModelForImageTextToText, out, name).model
    assert ours is not None
    pixels = normalised(pictures(), name)
    with torch.no_grad():
        tower = theirs.vision_tower(pixels, output_hidden_states=True)
        features = ours._features(pixels)
        whole = torch.stack(list(theirs.get_image_features(pixels).pooler_output))
        embedded = ours.tower.embeddings(pixels)
        torch.testing.assert_close(embedded, tower.hidden_states[0], rtol=0, atol=1e-5)
        before = tower.hidden_states[-1]
        after = theirs.vision_tower.post_layernorm(before)
        used, other = (after, before) if name.endswith("norm") else (before, after)
        torch.testing.assert_close(features, used, rtol=0, atol=1e-5)
        assert (features - other).abs().max() > 0.1
        torch.testing.assert_close(ours(pictures()), whole, rtol=0, atol=2e-5)


def _broken_runs(kind: str):
    right = mapping._runs

    def runs(op, tensors, llm):
        if kind == "qkv" and op == "qkv":
            return (mapping.Run(i, 0, mapping.prod(t.shape)) for i, t in enumerate(tensors))
        if kind == "bias" and op == "qkv" and len(tensors[0].shape) == 1:
            return (mapping.Run(i, 0, mapping.prod(t.shape)) for i, t in enumerate(tensors))
        if kind == "swapped" and op == "stack":
            return (mapping.Run(i, 0, mapping.prod(tensors[i].shape)) for i in (1, 0))
        return right(op, tensors, llm)

    return runs


@pytest.mark.parametrize("kind", ["qkv", "bias", "swapped", "nothing"])
def test_faults_of_the_table_break_the_scores(
    exports,
    groups: Groups,
    tmp_path: Path,
    monkeypatch,
    kind: str,
):
    _, out = exports["llava-siglip"]
    theirs = load(AutoModelForImageTextToText, out, "llava-siglip")
    monkeypatch.setattr(mapping, "_runs", _broken_runs(kind))
    native = import_hf([out], tmp_path / "native", ImportOptions())
    ours = NativeModel(native, groups)
    tokens, ids = PROMPTS[1]
    with torch.no_grad():
        wanted = theirs(**inputs_of(tokens, ids, 16, "llava-siglip")).logits[0]
    error = (ours.logits(tokens, pictures()[list(ids)], image=IMAGE) - wanted).abs().max()
    assert (error < 1e-5) if kind == "nothing" else (error > 1e-3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("What is in the picture?", "a red circle", "system user assistant tool")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(words, vocab_size=300, path=path)
    return path


@pytest.mark.parametrize("name", VLMS)
def test_the_processor_makes_as_many_places_as_the_model_has_embeddings(
    tmp_path: Path, tokenizer: Path, name: str
):
    model = build(name)
    parts = parts_of(model)
    found = find_assets(Assets(tokenizer=tokenizer))
    llm = parts.llm.model_copy(update={"vocab_size": 512})
    form = "llava" if name.startswith("llava") else "ghostvis"
    write_assets(
        tmp_path, found, Parts(llm, parts.vision, parts.connector), form, max_positions=128
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    processor = AutoProcessor.from_pretrained(tmp_path)
    question = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    messages = [{"role": "user", "content": question}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>user\n<|image|>What is in the picture?<|im_end|>\n<|im_start|>assistant\n"
    )
    picture = Image.fromarray(pictures(40)[0].permute(1, 2, 0).numpy())
    inputs = processor(text=prompt, images=[picture], return_tensors="pt")
    places = int((inputs["input_ids"] == found.tokens["image"]).sum())
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert places == parts.tokens_per_image
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    assert features.pooler_output[0].shape[0] == places
    # What vLLM asks a processor for.
    assert processor._get_num_multimodal_tokens([[40, 40]])["num_image_tokens"] == [places]


def parts_of(model: Any) -> Parts:
    from ghostvis_mega.convert.hf_config import parts_from_config

    return parts_from_config(json.loads(model.config.to_json_string(use_diff=False)), Path("x"))


def test_every_number_of_tokens_of_the_presets_can_be_told_to_the_processor():
    parts = parts_of(build("perceiver-siglip"))
    for size, patch, tokens in (
        (336, 14, 64),
        (336, 14, 144),
        (336, 16, 64),
        (224, 14, 64),
        (384, 14, 256),
        (448, 14, 64),
        (256, 32, 64),
        (336, 14, 65),
    ):
        vision = parts.vision.model_copy(update={"image_size": size, "patch_size": patch})
        connector = parts.connector.model_copy(update={"tokens_per_image": tokens})
        step, extra, strategy = processor_patches(Parts(parts.llm, vision, connector), "ghostvis")
        assert strategy == "full" and (size // step) ** 2 + extra == tokens


def test_the_tokenizer_loads_and_stops_where_training_does(
    exports, tmp_path: Path, tokenizer: Path
):
    native, _ = exports["llava-siglip"]
    own = Assets(tokenizer=tokenizer)
    told = f"{tokenizer} has 300 ids, the model only 157: it is another model's"
    with pytest.raises(CheckpointError, match=told):
        export_hf(native, tmp_path / "out", ExportOptions(assets=own))
    options = ExportOptions(assets=Assets(tokenizer=tokenizer), vocab_size=512)
    qwen = save(build("qwen2"), tmp_path / "qwen")
    wide = import_hf([qwen], tmp_path / "qwen-native", ImportOptions(vocab_multiple=512))
    with pytest.raises(CheckpointError, match="tokenizer of such a model as Qwen2Tokenizer"):
        export_hf(wide, tmp_path / "out", options)
    source = save(build("llama"), tmp_path / "source")
    wide = import_hf([source], tmp_path / "native", ImportOptions(vocab_multiple=512))
    for rows, told in (
        (None, "300 ids, the model 157 and 355 rows of padding: .* export --vocab-size 300`"),
        (200, "--vocab-size 200 is not between the tokenizer's 300 ids and the model's 512 rows"),
        (513, "--vocab-size 513 is not between"),
    ):
        with pytest.raises(CheckpointError, match=told):
            export_hf(wide, tmp_path / "out", ExportOptions(assets=own, vocab_size=rows))
    out = export_hf(wide, tmp_path / "out", options)
    loaded = AutoTokenizer.from_pretrained(out)
    text = "What is a red  circle?\n 42 \u00e9\U0001f642"
    found = find_assets(Assets(tokenizer=tokenizer))
    assert loaded.encode(text) == found.tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_id == found.tokens["eos"]
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"][0] == found.tokens["eos"]
    card = (out / "README.md").read_text()
    assert "Weights imported from source." in card and "vllm serve" in card


def test_the_code_in_an_export_needs_transformers_alone(exports):
    _, out = exports["perceiver-siglip"]
    for path in out.glob("*.py"):
        assert "ghostvis_mega" not in path.read_text()
    config = json.loads((out / "config.json").read_text())
    assert list(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForImageTextToText"]
    base = AutoModel.from_pretrained(out, trust_remote_code=True)
    assert type(base).__name__ == "GhostVisModel" and hasattr(base, "language_model")
