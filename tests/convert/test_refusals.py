"""What cannot be converted is refused with the tensor's name, and nothing is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.compare import compare, damage
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.hf_folder import HFFolder
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.convert.output import EXPORT_FILE
from ghostvis_mega.convert.quantize import quantize_hf
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json, document_digest
from tests.convert.cases import IMAGE, build, save

OPTIONS = ExportOptions(assets=Assets(tokens={"image": IMAGE}))
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("qwen2"), tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llava-siglip"), tmp_path_factory.mktemp("models") / "llava")


def changed(source: Path, folder: Path, *, config: dict[str, Any] | None = None, **tensors) -> Path:
    """A copy with other settings, and other tensors (None removes one)."""
    folder.mkdir()
    settings = json.loads((source / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    content = load_file(source / "model.safetensors") | tensors
    save_file({k: v for k, v in content.items() if v is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({NORM: None}, f"lacks {NORM}"),
        ({NORM: torch.ones(7)}, f"{NORM} has shape [7], config.json asks for [112]"),
        ({NORM: torch.ones(112, dtype=torch.int8)}, f"{NORM} is I8; quantised"),
        (
            {NORM: torch.ones(112, dtype=torch.int64)},
            f"lacks {NORM}, which config.json asks for as",
        ),
        ({"model.layers.1.extra.weight": torch.ones(3)}, "holds model.layers.1.extra.weight"),
        ({"lm_head.weight": None}, "lacks lm_head.weight"),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 112, dtype=torch.float16)},
            "model.layers.0.mlp.up_proj.weight are of different types",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, text: Path, tensors, told: str):
    source = changed(text, tmp_path / "source", **tensors)
    with pytest.raises(CheckpointError) as error:
        import_hf([source], tmp_path / "native", ImportOptions())
    assert told in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; read are qwen2, llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions are of type 'yarn'"),
        ({"num_hidden_layers": 2}, "holds model.layers.2."),
        ({"num_hidden_layers": 4}, "lacks model.layers.3."),
        ({"num_hidden_layers": "many"}, "config.json gives num_layers as 'many'"),
        ({"num_hidden_layers": None}, "num_layers"),
    ],
)
def test_a_config_that_does_not_fit_is_told(tmp_path: Path, text: Path, config, told: str):
    source = changed(text, tmp_path / "source", config=config)
    with pytest.raises(CheckpointError, match=None) as error:
        import_hf([source], tmp_path / "native", ImportOptions())
    assert told in str(error.value)


@pytest.mark.parametrize("beside", ["nothing", "a language model"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image_size": 0}, "--image-size 0 cannot be: Input should be greater than or equal to 1"),
        ({"image_size": -16}, "--image-size -16 cannot be"),
        ({"image_size": 2}, "--image-size 2 is no multiple of the tower's patch size 4: use 4, or"),
        ({"feature_layer": 3}, "feature_layer=3 is out of range"),
        ({"feature_layer": -9}, "feature_layer=-9 is out of range: it counts the 3 layers"),
        ({"feature_layer": -2, "post_norm": True}, "post_norm=true belongs to the last layer"),
    ],
)
def test_options_of_a_bare_tower_are_checked(tmp_path: Path, text: Path, beside, options, told):
    sources = [save(build("siglip"), tmp_path / "tower")]
    if beside != "nothing":
        sources.append(text)
    with pytest.raises(CheckpointError) as error:
        import_hf(sources, tmp_path / "native", ImportOptions(**options))
    assert told in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_tied_and_untied_files_must_be_what_they_say(tmp_path: Path, text: Path):
    tied = save(build("qwen2-tied"), tmp_path / "tied")
    says_untied = changed(tied, tmp_path / "untied", config={"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match="lacks lm_head.weight.*tie_word_embeddings is false"):
        import_hf([says_untied], tmp_path / "native", ImportOptions())
    says_tied = changed(text, tmp_path / "other", config={"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens"):
        import_hf([says_tied], tmp_path / "native", ImportOptions())
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    both = changed(tied, tmp_path / "both", **{"lm_head.weight": embedding.clone()})
    import_hf([both], tmp_path / "native", ImportOptions())


def test_a_tensor_in_two_files_is_named(tmp_path: Path):
    source = save(build("qwen2"), tmp_path / "source", files=2)
    first, second = sorted(source.glob("*.safetensors"))
    twice = load_file(second) | {NORM: torch.ones(112)}
    twice |= {name: tensor for name, tensor in load_file(first).items() if name == NORM}
    save_file(twice, second)
    save_file(load_file(first) | {NORM: torch.ones(112)}, first)
    with pytest.raises(CheckpointError, match=f"{NORM} is in {first.name} and in {second.name}"):
        import_hf([source], tmp_path / "native", ImportOptions())


def test_an_index_beside_a_single_file_is_refused(tmp_path: Path, text: Path):
    """transformers reads `model.safetensors` then, vLLM what the index lists."""
    source = save(build("qwen2"), tmp_path / "source", files=2)
    shutil.copy(text / "model.safetensors", source)
    for read in (
        lambda: import_hf([source], tmp_path / "native", ImportOptions()),
        lambda: compare(source, text),
        lambda: HFFolder(source),
    ):
        with pytest.raises(CheckpointError, match=r"holds model.safetensors and .*index.json, whi"):
            read()
    index = source / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert compare(source, text).differences == ()
    for name in ("a\0b.safetensors", "\ud800.safetensors", "../a.safetensors", "a.bin"):
        index.write_text(json.dumps({"weight_map": {NORM: name}}))
        with pytest.raises(CheckpointError, match=re.escape(f"lists the file {name!r}")):
            HFFolder(source)


def test_missing_and_cut_files_are_named(tmp_path: Path):
    source = save(build("qwen2"), tmp_path / "source", files=2)
    first, second = sorted(source.glob("*.safetensors"))
    data = second.read_bytes()
    second.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=f"{second.name} is no sound safetensors file: model"):
        import_hf([source], tmp_path / "native", ImportOptions())
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} cannot be read"):
        import_hf([source], tmp_path / "native", ImportOptions())
    second.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{second.name} is no sound .* the file has 0"):
        import_hf([source], tmp_path / "native", ImportOptions())
    second.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header would have"):
        import_hf([source], tmp_path / "native", ImportOptions())


def test_headers_that_lie_are_refused(tmp_path: Path, text: Path):
    def write(header: str, data: bytes = bytes(64)) -> Path:
        folder = tmp_path / "lies"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text((text / "config.json").read_text())
        raw = header.encode()
        path = folder / "model.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        return folder

    entry = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    overlap = '{"dtype":"F32","shape":[4],"data_offsets":[8,24]}'
    for header, told in (
        (f'{{"a":{entry},"a":{entry}}}', "it names a twice"),
        (f'{{"a":{entry},"b":{overlap}}}', "b overlaps another tensor"),
        ('{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}', "a should be bytes 0 to 396"),
        ('{"a":{"dtype":"F32","shape":[4]}}', "the entry of a is broken"),
        ("[]", "its header is no mapping"),
    ):
        with pytest.raises(CheckpointError, match=told):
            import_hf([write(header)], tmp_path / "native", ImportOptions())


def test_formats_that_cannot_hold_the_model_are_refused(tmp_path: Path, llava: Path):
    def native_of(name: str) -> Path:
        source = save(build(name), tmp_path / name)
        return import_hf([source], tmp_path / f"{name}-native", ImportOptions())

    for name, asked, told in (
        ("avgpool-siglip-norm", "llava", "LLaVA has no model.connector.kind=avgpool_mlp"),
        ("qwen2", "llava", "does not hold all of language model, tower and connector; possible: t"),
        ("qwen2", "tower", "the checkpoint holds no vision tower"),
        ("qwen2", "gguf", "--format gguf is unknown: use auto, llava"),
        ("siglip", "text", "the checkpoint holds no language model; possible: tower"),
    ):
        native = tmp_path / f"{name}-native"
        native = native if native.exists() else native_of(name)
        with pytest.raises(CheckpointError, match=told):
            export_hf(native, tmp_path / "out", ExportOptions(format=asked))
    native = import_hf([llava], tmp_path / "native", ImportOptions())
    with pytest.raises(CheckpointError, match="which token stands for an image"):
        export_hf(native, tmp_path / "out", ExportOptions())
    edited(native, lambda layout: layout | {"model.vision.post_norm": True})
    with pytest.raises(CheckpointError, match="output before its last norm.*; possible: ghostvis"):
        export_hf(native, tmp_path / "out", ExportOptions(format="llava", assets=OPTIONS.assets))
    edited(native, lambda layout: layout | {"model.llm.activation": "relu2"})
    with pytest.raises(CheckpointError, match="model.llm.activation=relu2 is in no model"):
        export_hf(native, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def edited(native: Path, change) -> None:
    """Change the settings in a checkpoint's manifest, digest included."""
    path = native / "manifest.json"
    document = json.loads(path.read_text())
    document["layout"] = change(document["layout"])
    document["digest"] = document_digest(document)
    path.write_bytes(canonical_json(document))


def test_a_checkpoint_that_differs_from_its_settings_is_refused(tmp_path: Path, text: Path):
    native = import_hf([text], tmp_path / "native", ImportOptions())
    edited(native, lambda layout: layout | {"model.llm.num_layers": 2})
    with pytest.raises(CheckpointError, match="holds decoder.layers.2.*it would be lost"):
        export_hf(native, tmp_path / "out", OPTIONS)
    edited(native, lambda layout: layout | {"model.llm.num_layers": 4})
    with pytest.raises(CheckpointError, match="lack decoder.layers.3.input_layernorm.weight"):
        export_hf(native, tmp_path / "out", OPTIONS)
    edited(native, lambda layout: layout | {"model.llm.num_layers": 3, "model.llm.qkv_bias": False})
    with pytest.raises(CheckpointError, match="linear_qkv.bias, which has no name in this format"):
        export_hf(native, tmp_path / "out", OPTIONS)


def test_damage_is_found_before_and_after(tmp_path: Path, llava: Path):
    native = import_hf([llava], tmp_path / "native", ImportOptions())
    out = export_hf(native, tmp_path / "out", OPTIONS)
    assert damage(native) == [] and damage(out) == []
    for folder, file in ((out, "config.json"), (out, "model.safetensors")):
        raw = bytearray((folder / file).read_bytes())
        raw[-1] ^= 1
        (folder / file).write_bytes(raw)
        (sentence,) = damage(folder)
        assert f"{folder / file} is damaged: its sha256 is" in sentence
        raw[-1] ^= 1
        (folder / file).write_bytes(raw)
    file = native / "llm-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    # A checkpoint of a run has SHA-256 alone.
    with pytest.raises(CheckpointError, match=f"{file} is damaged: its crc32 is"):
        export_hf(native, tmp_path / "again", OPTIONS)
    manifest = json.loads((native / "manifest.json").read_text())
    for entry in manifest["files"].values():
        assert entry.pop("crc32") is not None
    manifest["digest"] = document_digest(manifest)
    (native / "manifest.json").write_bytes(canonical_json(manifest))
    with pytest.raises(CheckpointError, match=f"{file} is damaged: its sha256 is"):
        export_hf(native, tmp_path / "again", OPTIONS)
    assert not (tmp_path / "again").exists()
    (difference,) = compare(native, out).differences
    assert difference.elements == 1
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read"):
        export_hf(native, tmp_path / "again", OPTIONS)


def test_an_export_whose_list_is_wrong_is_refused(tmp_path: Path, text: Path):
    native = import_hf([text], tmp_path / "native", ImportOptions())
    out = export_hf(native, tmp_path / "out", ExportOptions())
    content = json.loads((out / EXPORT_FILE).read_text())
    right = content["files"]["config.json"]
    for name, entry, told in (
        ("config.json", 5, "lists config.json without its `bytes` and `sha256`"),
        ("config.json", {}, "lists config.json without"),
        ("config.json", right | {"bytes": "many"}, "lists config.json without"),
        ("config.json", right | {"sha256": None}, "lists config.json without"),
        ("../config.json", right, "lists the file '../config.json'"),
        ("a\0b", right, r"lists the file 'a\x00b'"),
        ("\ud800", right, r"lists the file '\ud800'"),
    ):
        files = content["files"] | {name: entry}
        (out / EXPORT_FILE).write_text(json.dumps(content | {"files": files}))
        with pytest.raises(CheckpointError) as error:
            damage(out)
        assert told in str(error.value)
    (out / EXPORT_FILE).write_text(json.dumps(content))
    assert damage(out) == []


def test_a_directory_is_never_overwritten_without_being_told(tmp_path: Path, text: Path):
    out = tmp_path / "native"
    import_hf([text], out, ImportOptions())
    with pytest.raises(CheckpointError, match="exists already"):
        import_hf([text], out, ImportOptions())
    import_hf([text], out, ImportOptions(force=True))
    assert damage(out) == [] and not list(tmp_path.glob("*.replaced"))


@pytest.mark.parametrize("command", ["import", "export", "quantize"])
def test_force_never_deletes_what_is_read(tmp_path: Path, text: Path, monkeypatch, command: str):
    model = tmp_path / "models" / "text"
    shutil.copytree(text, model)
    source = model
    if command == "export":
        source = import_hf([model], tmp_path / "models" / "checkpoints" / "step-1", ImportOptions())

    def convert(out: Path) -> None:
        if command == "import":
            import_hf([source], out, ImportOptions(force=True))
        elif command == "export":
            export_hf(source, out, ExportOptions(force=True))
        else:
            quantize_hf(source, out, scheme="int8", force=True)

    before = everything_in(tmp_path)
    # Even where each looks like something that may be replaced.
    marks = [folder / EXPORT_FILE for folder in (source, source.parent, source.parent.parent)]
    inside = source / "inside"
    link = tmp_path / "link"
    link.symlink_to(source)
    for mark in marks:
        mark.write_text("{}")
    (inside / "x").mkdir(parents=True)
    (inside / EXPORT_FILE).write_text("{}")
    monkeypatch.chdir(source)
    for out in (source, source.parent, source.parent.parent, inside, link, Path("."), Path("..")):
        with pytest.raises(CheckpointError, match=f"does not replace {re.escape(str(out))}, bec"):
            convert(out)
    monkeypatch.chdir(tmp_path)
    link.unlink()
    shutil.rmtree(inside)
    for mark in marks:
        mark.unlink()
    for name in ("tmp", "replaced"):
        beside = source.with_name(f"new.{name}")
        source.rename(beside)
        source = beside
        with pytest.raises(CheckpointError, match=f"is written as new.{name} first"):
            convert(source.with_name("new"))
        source = source.rename(marks[0].parent)
    assert everything_in(tmp_path) == before
    convert(tmp_path / "new")
    convert(tmp_path / "new")
    assert damage(tmp_path / "new") == []


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_force_replaces_a_checkpoint_or_an_export_alone(tmp_path: Path, text: Path, easy_vqa: Path):
    dataset, notes = tmp_path / "some.gvd", tmp_path / "notes"
    shutil.copytree(easy_vqa / "train.gvd", dataset)
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    (notes / "manifest.json").write_text("[")
    before = everything_in(tmp_path)
    for out in (dataset, notes):
        with pytest.raises(CheckpointError, match="neither a checkpoint nor an export, so --force"):
            import_hf([text], out, ImportOptions(force=True))
    assert everything_in(tmp_path) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    for _ in range(2):
        import_hf([text], empty, ImportOptions(force=True))
    export_hf(empty, tmp_path / "out", ExportOptions())
    import_hf([text], tmp_path / "out", ImportOptions(force=True))
    assert damage(empty) == [] and damage(tmp_path / "out") == []


STALL = """
import sys, time
from pathlib import Path
from ghostvis_mega.convert import tensor_file
from ghostvis_mega.convert.importer import ImportOptions, import_hf
whole = tensor_file.TensorFileWriter.write
def slow(self, name, chunks):
    whole(self, name, chunks)
    print(name, flush=True)
    time.sleep(0.2)
tensor_file.TensorFileWriter.write = slow
import_hf([Path(sys.argv[1])], Path(sys.argv[2]), ImportOptions())
"""


def test_a_killed_import_leaves_nothing_that_looks_complete(tmp_path: Path, text: Path):
    out = tmp_path / "native"
    process = subprocess.Popen(
        [sys.executable, "-c", STALL, str(text), str(out)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert first.startswith(b"embedding.weight")
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["native.tmp"]
    import_hf([text], out, ImportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
