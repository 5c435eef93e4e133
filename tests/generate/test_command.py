"""`ghostvis generate` as people call it: answers are those of stock transformers; errors come
first."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.generate import prompts as prompts_module
from ghostvis_mega.generate.bench import PRESETS, Plan, make_model
from ghostvis_mega.generate.engine import Engine
from ghostvis_mega.generate.load import load_model, preparation_note
from ghostvis_mega.generate.prompts import make_requests, read_prompts
from ghostvis_mega.generate.sampling import Sampling
from ghostvis_mega.generate.text import HuggingFaceText, TextStream, TrainingText, open_text
from ghostvis_mega.generate.weights import config_of, open_model
from ghostvis_mega.utils.errors import DataError
from tests.convert.cases import build, save
from tests.generate.models import png

LENGTH = "6"
QUESTION = "What colour is the shape?"


@pytest.fixture(scope="module")
def data(easy_vqa: Path) -> Path:
    return easy_vqa / "train.gvd"


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, export) with the dataset's tokenizer; weights that answer something."""
    folder = tmp_path_factory.mktemp("command")
    settings = {**PRESETS["tiny"], "llm": {**PRESETS["tiny"]["llm"], "init_std": 0.15}}
    plan = Plan(preset="tiny", device=torch.device("cpu"))
    make_model(folder / "random", ModelConfig.model_validate(settings), plan)
    native = import_hf([folder / "random"], folder / "native", ImportOptions())
    options = ExportOptions(assets=Assets(data=data))
    return native, export_hf(native, folder / "export", options)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        # Of the tower's size: libraries resize a little differently.
        path.write_bytes(png(number, PRESETS["tiny"]["vision"]["image_size"]))
    return paths


def run(*arguments: Any) -> tuple[int, str, str]:
    found = CliRunner().invoke(
        app, ["generate", *map(str, arguments), "--device", "cpu", "--max-tokens", LENGTH]
    )
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


def stock_answer(export: Path, text: list[dict[str, Any]], files: list[Path]) -> str:
    processor = AutoProcessor.from_pretrained(export)
    stock = AutoModelForImageTextToText.from_pretrained(export).eval()
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )
    opened = [Image.open(path) for path in files]
    inputs = processor(text=prompt, images=opened or None, return_tensors="pt")
    ids = stock.generate(**inputs, max_new_tokens=int(LENGTH), do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_are_those_of_stock_transformers(model, data, pictures, count: int):
    native, export = model
    files = pictures[:count]
    content = [*({"type": "image"} for _ in files), {"type": "text", "text": QUESTION}]
    wanted = stock_answer(export, content, files)
    assert wanted.strip()
    options = ["--prompt", QUESTION, *(x for path in files for x in ("--image", path))]
    code, out, _ = run(export, *options)
    assert code == 0 and out == wanted + "\n"
    # Libraries show bytes that are no text in ways of their own, so tokens are compared here.
    tokens = [
        json.loads(run(*arguments, *options, "--json", "--logprobs")[1])[0]["completions"][0]
        for arguments in ([export], [native, "--data", data])
    ]
    assert tokens[0]["tokens"] == tokens[1]["tokens"]


def test_placeholders_put_pictures_into_the_text(model, pictures):
    files = [pictures[0], pictures[1]]
    content = [
        {"type": "text", "text": "Is "},
        {"type": "image"},
        {"type": "text", "text": " like "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    wanted = stock_answer(model[1], content, files)
    prompt = "Is <|image|> like <|image|>?"
    images = [x for path in files for x in ("--image", path)]
    assert run(model[1], "--prompt", prompt, *images)[1] == wanted + "\n"
    # The places matter.
    assert wanted != stock_answer(model[1], [*content[1::2], *content[::2]], files)


def test_training_and_export_agree_on_the_prompt(model, data):
    dataset = Dataset.open(data)
    ours = open_text(model[0], Assets(data=data))
    theirs = open_text(model[1], Assets())
    assert isinstance(ours, TrainingText) and isinstance(theirs, HuggingFaceText)
    assert ours.stop_tokens == theirs.stop_tokens and ours.image_token == theirs.image_token
    for index in range(3):
        tokens, ids, _, question = dataset.prompt(index)
        turns = [Turn("user", (*(ImagePart() for _ in ids), question))]
        assert ours.prompt(turns) == list(tokens)
        assert theirs.prompt(turns) == list(tokens)
    chat = [
        Turn("system", ("Be brief.",)),
        Turn("user", ("Hi",)),
        Turn("assistant", ("yes",)),
        Turn("user", ("And?",)),
    ]
    assert ours.prompt(chat) == theirs.prompt(chat)


def test_a_file_of_prompts_becomes_a_file_of_answers(model, pictures, tmp_path):
    rows = [
        {"prompt": QUESTION, "images": [str(pictures[0])]},
        {"prompt": QUESTION, "n": 3, "temperature": 1.0, "seed": 4, "id": "b"},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}],
         "images": [str(pictures[1])]},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    out = tmp_path / "deep" / "out.jsonl"
    code, _, err = run(
        model[1], "--input", tmp_path / "in.jsonl", "--output", out, "--logprobs", "--rows", 2
    )
    assert code == 0 and "tokens/s" in err and "2 encoded" in err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(row["completions"]) for row in found] == [1, 3, 1]
    assert found[1]["id"] == "b" and len({c["text"] for c in found[1]["completions"]}) > 1
    one = run(model[1], "--prompt", QUESTION, "--image", pictures[0], "--json")
    (alone,) = json.loads(one[1])
    assert alone["completions"][0]["text"] == found[0]["completions"][0]["text"]
    first = found[0]["completions"][0]
    assert len(first["logprobs"]) == len(first["tokens"]) == first["num_tokens"]
    assert list(tmp_path.glob("deep/*")) == [out]


def test_a_file_of_prompts_holds_no_pictures_in_memory(model, pictures, tmp_path, monkeypatch):
    """They are checked, each once, and read again when their prompt's turn comes."""
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for path, picture in zip(files, pictures, strict=False):
        shutil.copyfile(picture, path)
    rows = [{"prompt": QUESTION, "images": [files[i].name]} for i in (0, 1, 0, 0)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = prompts_module.read_picture
    checked: list[Path] = []
    monkeypatch.setattr(
        prompts_module,
        "read_picture",
        lambda path, where: (checked.append(path), read(path, where)),
    )
    found = list(read_prompts(tmp_path / "in.jsonl", system=None, sampling=Sampling(max_tokens=3)))
    text = open_text(model[1], Assets())
    requests = make_requests(found, text, config_of(model[1]), raw=False)
    assert checked == files
    whole = config_of(model[1])
    llm = whole.llm.model_copy(update={"vocab_padding": whole.llm.vocab_size - 10})
    with pytest.raises(DataError, match=r"line 1: the prompt holds token .*, the model has 10"):
        make_requests(found, text, whole.model_copy(update={"llm": llm}), raw=False)
    assert [request.images for request in requests] == [(files[i],) for i in (0, 1, 0, 0)]
    loaded = load_model(model[1], device=torch.device("cpu"), dtype=torch.float32)
    engine = Engine(loaded, image_token=text.image_token)
    held = [dataclasses.replace(r, images=(r.images[0].read_bytes(),)) for r in requests]
    assert engine.generate(requests) == engine.generate(held)
    files[1].unlink()
    with pytest.raises(DataError, match="image .*1.png cannot be read: No such file"):
        engine.generate(requests)


def test_streamed_text_is_the_answer(model, pictures):
    options = [model[1], "--prompt", QUESTION, "--image", pictures[2]]
    assert run(*options, "--stream")[1] == run(*options)[1]


def test_plain_text_goes_on(model, data):
    assert run(model[0], "--data", data, "--prompt", "What", "--raw")[0] == 0
    code, _, err = run(model[1], "--prompt", "What", "--raw", "--system", "x")
    assert code == 2 and "--raw takes text alone" in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "x", "--image", "none.png"], "image none.png cannot be read: No such file"),
        (["--prompt", "x", "--image", __file__], "cannot be used: not_an_image"),
        (["--prompt", "<|image|> <|image|>", "--image", "a.png"], "2 times <|image|>, but 1 image"),
        (["--prompt", "<|image|>"], "1 times <|image|>, but 0 images"),
        (["--prompt", "word " * 600], "positions, and the model has 512"),
        (["--prompt", "x", "--top-p", "2"], "top_p=2.0 cannot be"),
        (["--input", "none.jsonl"], "none.jsonl cannot be read"),
        (["--prompt", "x", "--temperature", "1e-40"], "temperature=1e-40 cannot be"),
        (["--prompt", "x", "--tensor", "3"], "--tensor 3 does not divide model.llm.num_kv_heads"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    model, options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ghostvis_mega.generate.load.load_model", None)
    code, _, err = run(model[1], *options)
    assert code == 2 and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "x", "--logprobs"], "are written by --json or into --output"),
        (["--prompt", "x", "--data", "d", "--tokenizer", "t"], "give one of --data, --tokenizer"),
        (["--prompt", "x", "--data", "d", "--template", "zephyr"], "is for --tokenizer"),
        (["--input", "a.jsonl", "--output", "./a.jsonl"], "its prompts would be lost"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = run("model", *options)
    assert code == 2 and sentence in err


def test_a_gpu_that_is_not_there_is_told_before_loading(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ghostvis_mega.generate.load.load_model", None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    arguments = ["generate", str(model[1]), "--prompt", "x", "--device", "cuda"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2 and found.stderr.count("\n") == 1
    assert "--device cuda with --tensor 1 needs 1 NVIDIA GPU here, torch finds 0" in found.stderr


@pytest.fixture(scope="module")
def chat(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text alone with the tokenizer and template of the other."""
    whole = build("qwen2")
    settings = whole.config.to_dict() | {"vocab_size": open_text(model[1], Assets()).size}
    small = type(whole)(type(whole.config)(**settings))
    folder = save(small, tmp_path_factory.mktemp("text") / "chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model[1] / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (b"{{ messages[0].content + 1 }}", "its chat template fails: "),
        (b"{{ 1 / 0 }}", "its chat template fails: division by zero"),
        (b"{{ raise_exception('no') }}", "its chat template fails: no"),
        (b"\xff", "chat_template.jinja cannot be read: 'utf-8'"),
    ],
)
def test_a_chat_template_that_fails_is_told(chat: Path, template: bytes, sentence: str):
    (chat / "chat_template.jinja").write_bytes(template)
    code, _, err = run(chat, "--prompt", "x")
    assert code == 2 and sentence in err and err.count("\n") == 1


def test_a_picture_for_a_model_of_text_is_refused(chat: Path, pictures):
    (chat / "chat_template.jinja").write_text("{{ 'a' + messages[0].content }}")
    assert run(chat, "--prompt", "x")[0] == 0
    code, _, err = run(chat, "--prompt", "x", "--image", pictures[0])
    assert code == 2 and "--prompt: 1 image came with the prompt, but the model has no" in err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is no JSON object"),
        ('{"prompt": "x", "temprature": 1}', "'temprature' is unknown"),
        ('{"images": []}', "give one of prompt and messages"),
        ('{"prompt": "x", "images": "a.png"}', "images is no list"),
        ('{"prompt": "x", "n": 0}', "n=0 cannot be"),
        ('{"prompt": "x", "n": true}', "n=True cannot be"),
        ('{"prompt": "x", "max_tokens": 1.5}', "max_tokens=1.5 cannot be: it must be a whole"),
        ('{"prompt": "x", "temperature": NaN}', "temperature=nan cannot be"),
        ('{"prompt": "x", "stop": [1]}', "stop=(1,) cannot be: it must be a text or a list"),
        ('{"prompt": "x", "stop": 5}', "stop=5 cannot be"),
        ('{"prompt": "x", "stop": ""}', "stop=('',) cannot be"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content is neither"),
        ('{"messages": [{"role": "user", "content": "x"}], "images": ["a"]}', "show 0 images, 1"),
        ('{"messages": [{"role": "user", "content": "x"}], "system": "y"}', "beside messages"),
        ('{"messages": [{"role": "user", "content": "x"}], "system": 3}', "system is 3"),
        ('{"prompt": "x", "system": []}', "system is []"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "conversation"),
    ],
)
def test_a_broken_line_is_named(model, data, tmp_path, line: str, sentence: str):
    (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    code, _, err = run(model[0], "--data", data, "--input", tmp_path / "in.jsonl")
    assert code == 2 and sentence in err and "in.jsonl, line 2" in err


def test_a_stop_text_is_one_text_and_lines_end_at_line_feeds(tmp_path):
    rows = [{"prompt": "a\u2028b\u0085c", "stop": "qx"}, {"prompt": "d", "stop": ["q", "x"]}]
    path = tmp_path / "in.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    found = list(read_prompts(path, system=None, sampling=Sampling()))
    assert [prompt.sampling.stop for prompt in found] == [("qx",), ("q", "x")]
    assert [prompt.asked["prompt"] for prompt in found] == ["a\u2028b\u0085c", "d"]


def test_models_that_cannot_answer_are_named(model, data, tmp_path):
    code, _, err = run(model[0], "--prompt", "x")
    assert code == 2 and "holds no tokenizer: name the data" in err
    code, _, err = run(tmp_path, "--prompt", "x")
    assert code == 2 and "holds neither" in err


def saved_by_transformers(export: Path, folder: Path, **settings: Any) -> Path:
    """The processor as `save_pretrained` writes it, in one file."""
    processor = AutoProcessor.from_pretrained(export)
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    processor.save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    return folder


def test_other_preparation_of_pictures_is_noted(model, tmp_path):
    side = PRESETS["tiny"]["vision"]["image_size"]
    square, shorter = {"height": side, "width": side}, {"shortest_edge": side}
    same = saved_by_transformers(model[1], tmp_path / "same")
    crop = saved_by_transformers(model[1], tmp_path / "crop", do_center_crop=True)
    uncut = saved_by_transformers(model[1], tmp_path / "uncut", size=shorter)
    with open_model(model[1]) as source:
        assert source.model.vision.kind == "siglip"

        def note(folder: Path) -> str | None:
            return preparation_note(dataclasses.replace(source, path=folder))

        assert note(model[1]) is None and note(same) is None
        assert f"{crop}/processor_config.json asks for do_center_crop=True;" in str(note(crop))
        assert f"asks for size={shorter};" in str(note(uncut))
        for number, (settings, told) in enumerate(
            (
                ({"size": square}, None),
                ({"size": side}, None),
                ({"size": side + 4}, "asks for size="),
                ({"size": square, "do_center_crop": True}, "asks for do_center_crop=True;"),
                ({"size": {**square, "width": 8}}, "asks for size="),
            )
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
            found = note(folder)
            assert found is None if told is None else told in str(found)
        # Of two files transformers reads the new one.
        shutil.copyfile(same / "processor_config.json", folder / "processor_config.json")
        assert note(folder) is None


def test_a_damaged_file_is_named(model, data, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    for path in model[1].iterdir():
        (export / path.name).write_bytes(path.read_bytes())
    weights = bytearray((export / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (export / "model.safetensors").write_bytes(weights)
    code, _, err = run(export, "--prompt", "x")
    assert code == 2 and "model.safetensors is damaged" in err
    assert run(export, "--prompt", "x", "--no-verify")[0] == 0


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_the_command_starts_its_ranks(model, pictures):
    """Three processes: too many for two busy cores in every `make test`."""
    answers = []
    for tensor in ("1", "2"):
        command = [sys.executable, "-m", "ghostvis_mega", "generate", str(model[1])]
        options = ["--device", "cpu", "--max-tokens", "4", "--json", "--image", str(pictures[0])]
        done = subprocess.run(
            [*command, *options, "--prompt", QUESTION, "--tensor", tensor, "--logprobs"],
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(json.loads(done.stdout)[0]["completions"][0])
    assert answers[0]["tokens"] == answers[1]["tokens"] and len(answers[0]["tokens"]) == 4
    assert answers[0]["text"] == answers[1]["text"]


def test_a_text_is_shown_once_it_is_sure():
    stream = TextStream(("END",))
    shown = [stream.more(text, final=False) for text in ("a", "a\ufffd", "a\u20ac E", "a\u20ac EN")]
    assert shown == ["a", "", "\u20ac ", ""]
    assert stream.more("a\u20ac ENx", final=False) == "ENx"
    assert stream.more("a\u20ac ENx\ufffd", final=True) == "\ufffd"
