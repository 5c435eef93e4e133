"""Tokenizers, chat templates and pictures are on the other side what they are in training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoProcessor, CLIPVisionModel, GenerationConfig, SiglipVisionModel

from ghostvis_mega.convert.assets import Assets, find_assets, image_processor, write_assets
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.hf_template import HFChat
from ghostvis_mega.convert.hf_tokenizer import (
    PROBES,
    chat_template,
    check_same_ids,
    to_tokenizer_json,
)
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.encode import Row
from ghostvis_mega.data.images import load_image
from ghostvis_mega.data.ingest import Source, ingest
from ghostvis_mega.data.styles import STYLES
from ghostvis_mega.data.template import ChatTemplate, ImagePart, Turn, load_tokenizer
from ghostvis_mega.data.tokenizer import train_tokenizer
from ghostvis_mega.generate.text import open_text
from ghostvis_mega.model.vision import _PIXEL_STATISTICS
from ghostvis_mega.utils.errors import CheckpointError, DataError
from tests.convert.cases import build, different, save, tensors_of
from tests.convert.gguf_cases import letters
from tests.convert.test_stock_programs import parts_of
from tests.data.vocabularies import mistral_model, qwen_ranks, smollm2_json

TEXTS = (
    *PROBES,
    "It's 1999; they'd've said \"no\" -- twice!\r\n\r\n  indented\n",
    "a" * 40 + " aaaa b aaa",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002 \u041f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f468\u200d\U0001f469",
    "x = [i**2 for i in range(10)]\t# \x01 control",
)


def own_model(folder: Path) -> Path:
    words = ("What is in the picture? a red circle", "system user assistant tool 0 1 2")
    path = folder / "own.model"
    train_tokenizer(words, vocab_size=300, path=path)
    return path


@pytest.mark.parametrize("make", [own_model, mistral_model, qwen_ranks, smollm2_json])
def test_a_vocabulary_has_the_same_ids_as_tokenizer_json(
    tmp_path: Path, make: Callable[[Path], Path]
):
    tokenizer = load_tokenizer(make(tmp_path))
    texts = [text for text in TEXTS if "\x01" not in text or make is not smollm2_json]
    converted = to_tokenizer_json(tokenizer)
    check_same_ids(tokenizer, converted, texts)
    for text in texts:
        ids = tokenizer.encode(text)
        assert converted.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    for name, token in tokenizer.specials.items():
        assert converted.token_to_id(tokenizer.piece(token)) == token, name
        assert converted.encode(tokenizer.piece(token), add_special_tokens=False).ids == [token]


def test_another_vocabulary_is_noticed(tmp_path: Path):
    tokenizer = load_tokenizer(own_model(tmp_path))
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "other.model"
    train_tokenizer(("completely different words here",), vocab_size=290, path=other)
    converted = to_tokenizer_json(load_tokenizer(other))
    with pytest.raises(CheckpointError, match="cannot be written as tokenizer.json: 'What is"):
        check_same_ids(tokenizer, converted, TEXTS)


CHAT = [
    Turn("system", ("Be brief.",)),
    Turn("user", (ImagePart(), "What is it?", ImagePart())),
    Turn("assistant", ("A cat.",)),
    Turn("user", ("Sure?",)),
    Turn("assistant", ("Yes.",)),
]


def rendered(template: str, turns: list[Turn], *, prompt: bool) -> str:
    messages = [
        {
            "role": turn.role,
            "content": turn.text
            if not turn.num_images
            else [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]
    # As transformers renders it.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("first", [0, 1])
def test_every_chat_template_writes_what_training_saw(tmp_path: Path, style: str, first: int):
    tokenizer = load_tokenizer(own_model(tmp_path), template=style)
    template = chat_template(STYLES[style], tokenizer)
    converted = to_tokenizer_json(tokenizer)
    turns = CHAT[first:]
    text = rendered(template, turns, prompt=False)
    wanted = ChatTemplate(tokenizer, style).encode(turns, num_images=2).tokens.tolist()
    assert converted.encode(text, add_special_tokens=False).ids == wanted
    question = turns[-2].text
    text = rendered(template, [Turn("user", (question,))], prompt=True)
    wanted = ChatTemplate(tokenizer, style).prompt(question, num_images=0)
    assert converted.encode(text, add_special_tokens=False).ids == wanted


@pytest.mark.parametrize("name", ["llava-siglip", "llava-clip"])
def test_pictures_are_prepared_as_in_training(tmp_path: Path, name: str):
    from transformers import AutoImageProcessor

    parts = parts_of(build(name))
    write_assets(tmp_path, find_assets(Assets(tokens={})), parts, "llava", max_positions=None)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    generator = np.random.Generator(np.random.PCG64(3))
    path = tmp_path / "picture.png"
    # Neither square nor of the model's size: aspect is given up alike.
    Image.fromarray(generator.integers(0, 256, (37, 50, 3), dtype=np.uint8)).save(path)
    found = processor(images=[Image.open(path)], return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(x)[:, None, None] for x in _PIXEL_STATISTICS[name.split("-")[1]])
    pixels = load_image(path.read_bytes(), image_size=16, augment_seed=None)
    wanted = (pixels.float() / 255 - mean) / std
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    settings = image_processor(parts)
    assert settings["crop_size"] == {"height": 16, "width": 16}


@pytest.mark.parametrize("name", ["siglip", "clip"])
@pytest.mark.parametrize("size", [24, 8])
def test_the_position_table_is_resized_once_as_transformers_would(
    tmp_path: Path, name: str, size: int
):
    model = build(name)
    source = save(model, tmp_path / "source")
    native = import_hf([source], tmp_path / "native", ImportOptions(image_size=size))
    out = export_hf(native, tmp_path / "out", ExportOptions())
    kind = SiglipVisionModel if name == "siglip" else CLIPVisionModel
    resized = kind.from_pretrained(out).eval()
    assert resized.config.image_size == size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        found = resized(pixels).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    table = [key for key in tensors_of(out) if "position_embedding" in key]
    assert different(tensors_of(source), tensors_of(out)) == table
    with pytest.raises(CheckpointError, match="--image-size 18 is no multiple of .* 4"):
        import_hf([source], tmp_path / "new", ImportOptions(image_size=18))


TEXT_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}"
    "{{ '<|image_pad|>' }}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM_END, PAD, ENDOFTEXT = 257, 258, 259


def base_qwen(folder: Path, template: str | None) -> Path:
    """The files that Qwen2.5's base model has: answers end with a token that no setting names."""
    folder.mkdir()
    made = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(letters())}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if template is not None:
        settings["chat_template"] = template
    for name, value in (
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"eos_token_id": ENDOFTEXT, "max_new_tokens": 2048}),
        ("config.json", {"model_type": "qwen2", "eos_token_id": ENDOFTEXT}),
    ):
        (folder / name).write_text(json.dumps(value))
    return folder


def wide(folder: Path, name: str) -> Path:
    """A checkpoint whose vocabulary has room for that tokenizer."""
    source = save(build(name), folder / f"{name}-source")
    return import_hf([source], folder / name, ImportOptions(vocab_multiple=512))


def with_assets(native: Path, out: Path, assets: Assets) -> Path:
    return export_hf(native, out, ExportOptions(assets=assets, vocab_size=512))


def test_an_export_with_copied_files_can_be_asked_about_a_picture(tmp_path: Path):
    source = base_qwen(tmp_path / "assets", PARTS)
    (source / "secret.txt").write_text("x")
    assets = Assets(folder=source, tokens={"image": PAD})
    native = wide(tmp_path, "llava-siglip")
    out = with_assets(native, tmp_path / "out", assets)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "secret.txt").exists()
    assert find_assets(Assets(folder=out)).tokens["image"] == PAD
    processor = AutoProcessor.from_pretrained(out)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<|image_pad|>What?<|im_end|>\n<|im_start|>assistant\n"
    ours = open_text(out, Assets())
    turns = [Turn("user", (ImagePart(), "What?"))]
    assert ours.prompt(turns) == processor.tokenizer.encode(prompt, add_special_tokens=False)
    # What ends an answer in the template ends it in both programs; all else is as it was.
    assert GenerationConfig.from_pretrained(out).eos_token_id == [IM_END, ENDOFTEXT]
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 2048
    assert ours.stop_tokens == {IM_END, ENDOFTEXT}
    again = with_assets(native, tmp_path / "again", Assets(folder=out))
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        with_assets(native, tmp_path / "new", assets)


def test_a_chat_template_without_pictures_is_for_text_alone(tmp_path: Path):
    native = wide(tmp_path, "llava-siglip")
    for number, (template, told) in enumerate(
        (
            (TEXT_ONLY, "its chat template fails: .*so nobody could ask .*give --data"),
            (None, "holds no chat template, so nobody"),
            (PARTS.replace("<|image_pad|>", "<img>"), "makes 0 times <|image_pad|>"),
            (PARTS.replace("image_pad|>", "image_pad|><|image_pad|>"), "makes 2 times"),
        )
    ):
        source = base_qwen(tmp_path / f"assets-{number}", template)
        with pytest.raises(CheckpointError, match=told.replace("|", r"\|")):
            with_assets(native, tmp_path / "out", Assets(folder=source, tokens={"image": PAD}))
    assert not (tmp_path / "out").exists()
    source = tmp_path / "assets-0"
    # As the sentence says: its vocabulary with the template of the data.
    out = with_assets(native, tmp_path / "out", Assets(tokenizer=source / "tokenizer.json"))
    assert open_text(out, Assets()).stop_tokens == {IM_END, ENDOFTEXT}
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    prompt = AutoProcessor.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\n<|image_pad|>What?<|im_end|>\n<|im_start|>assistant\n"
    # A model of text is asked with that template, and stops where it ends.
    text = with_assets(wide(tmp_path, "llama"), tmp_path / "text", Assets(folder=source))
    assert open_text(text, Assets()).stop_tokens == {IM_END, ENDOFTEXT}
    # So does the checkpoint that borrows it; a base model alone ends as its settings say.
    assert open_text(native, Assets(folder=source)).stop_tokens == {IM_END, ENDOFTEXT}
    assert open_text(source, Assets()).stop_tokens == {ENDOFTEXT}
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 / 0 }}"}')
    with pytest.raises(DataError, match="its chat template fails: division by zero"):
        with_assets(tmp_path / "llama", tmp_path / "new", Assets(folder=source))


def test_the_end_of_an_answer_is_read_from_parts_where_text_has_no_place(tmp_path: Path):
    """As LLaVA 1.5's template; it puts no special behind an answer."""
    folder = base_qwen(
        tmp_path / "assets",
        "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for p in m.content | "
        "selectattr('type', 'equalto', 'text') %}{{ p.text + ' ' }}{% endfor %}{% endfor %}",
    )
    assert HFChat(folder).end_token() is None
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(DataError, match="its chat template leaves the answer out"):
        HFChat(folder).end_token()


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_specials_that_a_vocabulary_lacks_keep_their_names_in_a_dataset(
    tmp_path: Path, template: str
):
    """The word `image` is in the vocabulary, so a special of that name would be the word."""
    pieces = [*letters(), "im", "ima", "imag", "image"]
    merges = [("i", "m"), ("im", "a"), ("ima", "g"), ("imag", "e")]
    words = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.save(str(tmp_path / "words.json"))
    made = load_tokenizer(tmp_path / "words.json", template=template)
    turns = (Turn("user", ("What?",)), Turn("assistant", ("A cat.",)))
    path = tmp_path / "own.gvd"
    ingest([Source("own", [Row("0", turns)])], tokenizer=made, path=path, template=template)
    found = Dataset.open(path).tokenizer
    assert found.specials == made.specials and made.specials["image"] >= len(pieces)
    for token in found.specials.values():
        assert found.piece(token) == made.piece(token)
    to_tokenizer_json(found)
