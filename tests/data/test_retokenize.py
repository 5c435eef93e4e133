"""Another tokenizer or template gives the dataset that ingesting with it would have given."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.operations.copying import Part, Piece, write_parts
from ghostvis_mega.data.operations.retokenize import count, retokenize
from ghostvis_mega.data.recover import irreversible
from ghostvis_mega.data.template import DOCUMENT, Turn, load_tokenizer
from ghostvis_mega.data.tokenizer import SPECIALS, Tokenizer
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.cli import main

SAMPLES = ("tokens.bin", "samples.idx", "images.ref", "spans.bin", "keys.bin", "answers.bin")
DOCUMENTS = (
    "Gr\u00fc\u00dfe \u2014 \u65e5\u672c\u8a9e \u2581 \U0001f600 <|im_end|>",
    "a b  c\n\td " * 9,
    "\ufffd stays \ufffd",
)


def _json_tokenizer(path: Path, *, normalizer: object = None, **added: object) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["what color is the shape?", "assistant", "user"] * 3, trainer)
    if normalizer is not None:
        made.normalizer = normalizer
    if added:
        made.add_tokens([tokenizers.AddedToken("<tag>", special=False, **added)])
    path.write_text(made.to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _json_tokenizer(tmp_path_factory.mktemp("json") / "tokenizer.json")


def _documents() -> list[Row]:
    return [Row(f"text/{n}", (Turn(DOCUMENT, (text,)),)) for n, text in enumerate(DOCUMENTS)]


def _tree(path: Path) -> dict[str, bytes]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _same_samples(first: Path, second: Path) -> list[str]:
    """Sample files that differ."""
    return [
        name
        for name in SAMPLES
        if (first / "samples" / name).read_bytes() != (second / "samples" / name).read_bytes()
    ]


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma"])
def test_the_result_is_what_ingest_gives(
    rows: list[Row], tokenizer: Tokenizer, byte_level: Path, template: str, tmp_path: Path
) -> None:
    sources = [Source("chats", rows), Source("texts", _documents())]
    parent, made, direct = (tmp_path / f"{name}.gvd" for name in ("parent", "made", "direct"))
    ingest(sources, tokenizer=tokenizer, path=parent, max_tokens=7)
    new = load_tokenizer(byte_level, template=template)
    with Dataset.open(parent) as opened:
        assert opened.num_samples > len(rows) + len(DOCUMENTS)  # documents were cut
        retokenize(opened, tokenizer=new, template=template, path=made, max_tokens=11)
    ingest(sources, tokenizer=new, path=direct, template=template, max_tokens=11)
    assert _same_samples(made, direct) == []
    assert set(_same_samples(made, parent)) >= {"tokens.bin", "spans.bin"}  # negative control
    assert verify_dataset(made, deep=True) == []
    shard = "media/00000.tar"
    assert (made / shard).read_bytes() == (direct / shard).read_bytes()
    assert (made / shard).stat().st_ino == (parent / shard).stat().st_ino
    sources = json.loads((made / "manifest.json").read_bytes())["sources"]
    assert [source["name"] for source in sources] == ["chats", "texts"]


def test_the_number_of_workers_does_not_enter(
    dataset: Dataset, byte_level: Path, tmp_path: Path
) -> None:
    new = load_tokenizer(byte_level)
    options = {"tokenizer": new, "template": "chatml"}
    for workers in (1, 2):
        retokenize(dataset, path=tmp_path / f"{workers}.gvd", workers=workers, **options)
    assert _tree(tmp_path / "1.gvd") == _tree(tmp_path / "2.gvd")
    counted = count(dataset, **options)
    assert counted.samples == dataset.num_samples
    with Dataset.open(tmp_path / "1.gvd") as made:
        assert counted.tokens == made.manifest.counts.tokens != dataset.manifest.counts.tokens
        assert made.image_bytes(3) == dataset.image_bytes(3)


def test_parts_of_a_document_that_are_gone_are_in_the_ledger(
    tokenizer: Tokenizer, byte_level: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.gvd"
    ingest([Source("texts", _documents())], tokenizer=tokenizer, path=whole, max_tokens=7)
    for gone, reason in ((0, "document_torn"), (1, "document_torn")):
        part, made = tmp_path / f"part{gone}.gvd", tmp_path / f"made{gone}.gvd"
        with Dataset.open(whole) as opened:
            left = np.delete(np.arange(opened.num_samples), gone)
            write_parts([Part(part, (Piece(opened, left),))])
        with Dataset.open(part) as opened:
            retokenize(opened, tokenizer=load_tokenizer(byte_level), template="chatml", path=made)
        ledger = [json.loads(line) for line in (made / "rejects.jsonl").read_text().splitlines()]
        assert {row["reason"] for row in ledger} == {reason}
        assert all(row["key"].startswith("text/0") for row in ledger)
        with Dataset.open(made) as opened:
            assert [opened.sample_key(n)[0] for n in range(2)] == ["text/1", "text/2"]


def test_tokenizers_that_change_text_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert irreversible(tokenizer) is None
    nfc = tokenizers.normalizers.NFC()
    found = {
        "plain": irreversible(load_tokenizer(_json_tokenizer(tmp_path / "plain.json"))),
        "nfc": irreversible(load_tokenizer(_json_tokenizer(tmp_path / "n.json", normalizer=nfc))),
        "strip": irreversible(load_tokenizer(_json_tokenizer(tmp_path / "s.json", rstrip=True))),
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text", "more text"]), model_writer=model, vocab_size=300,
        model_type="bpe", hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name="nmt_nfkc", control_symbols=list(SPECIALS.values()),
    )  # fmt: skip
    (tmp_path / "nfkc.model").write_bytes(model.getvalue())
    found["nfkc"] = irreversible(load_tokenizer(tmp_path / "nfkc.model"))
    assert found["plain"] is None
    assert "(NFC)" in str(found["nfc"]) and "<tag>" in str(found["strip"])
    assert "precompiled_charsmap" in str(found["nfkc"])


def test_text_that_was_normalised_is_taken_only_on_request(
    byte_level: Path, rows: list[Row], tmp_path: Path
) -> None:
    nfc = tokenizers.normalizers.NFC()
    old = load_tokenizer(_json_tokenizer(tmp_path / "nfc.json", normalizer=nfc))
    parent, made = tmp_path / "parent.gvd", tmp_path / "made.gvd"
    rows = [*rows[:6], Row("decomposed", (Turn(DOCUMENT, ("e\u0301",)),))]
    ingest([Source("rows", rows)], tokenizer=old, path=parent)
    options = {"tokenizer": load_tokenizer(byte_level), "template": "chatml", "path": made}
    with Dataset.open(parent) as opened:
        with pytest.raises(DataError, match=r"normalises text \(NFC\).*--accept-normalized"):
            retokenize(opened, **options)
        assert not made.exists()
        retokenize(opened, accept_normalized=True, **options)
    with Dataset.open(made) as opened:
        sample = opened.sample(opened.num_samples - 1)
        assert opened.tokenizer.decode(sample.tokens) == "\u00e9"


def test_the_command(
    dataset: Dataset, byte_level: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, made = shutil.copytree(dataset.path, tmp_path / "parent.gvd"), tmp_path / "made.gvd"

    def run(*options: object) -> int:
        command = ["tokenize", parent, "--tokenizer", byte_level, *options]
        try:
            return main([str(word) for word in command])
        except SystemExit as end:
            return int(end.code or 0)

    assert run("--dry-run", "--json") == 0
    counted = json.loads(capsys.readouterr().out)
    assert not made.exists()
    assert run("--out", made, "--template", "llama3", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == counted["samples"] == dataset.num_samples
    assert report["tokens"] != counted["tokens"]  # another template
    assert run("--out", made) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("--out", parent, "--force") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run() == 2
    assert "--out is needed" in capsys.readouterr().err
    assert verify_dataset(parent, deep=True) == []
