"""Datasets, tokenizers, checkpoints and model directories with something else inside."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ghostvis_mega.cli.hostile.case import Case, Kit, deep, put, put_json
from ghostvis_mega.utils.files import canonical_json, document_digest

CONFIG = {
    "model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 64, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip


def safetensors(
    header: str | bytes, data: bytes = bytes(64), *, length: int | None = None
) -> bytes:
    """A file with any header."""
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensors(**entries: Any) -> str:
    """A header."""
    return json.dumps({name.replace("__", "."): entry for name, entry in entries.items()})


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """Of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS: dict[str, Callable[[Kit], bytes]] = {
    "header of 2^63 bytes": lambda kit: safetensors("{}", length=1 << 63),
    "header longer than the file": lambda kit: safetensors("{}", length=10_000),
    "header of 90 MB": lambda kit: safetensors(b'{"a":1}' + b" " * 90_000_000),
    "header of deep JSON": lambda kit: safetensors('{"a":' + deep() + "}"),
    "header that is a list": lambda kit: safetensors("[]"),
    "offsets that overlap": lambda kit: safetensors(
        tensors(a=entry([4], 0, 16), b=entry([4], 8, 24))),
    "offsets beyond the file": lambda kit: safetensors(tensors(a=entry([1 << 40], 0, 1 << 42))),
    "offsets below zero": lambda kit: safetensors(tensors(a=entry([4], -16, 0))),
    "a shape below zero": lambda kit: safetensors(tensors(a=entry([-2, -2], 0, 16))),
    "a shape of 10^5 digits": lambda kit: safetensors(
        '{"a":{"dtype":"F32","shape":[' + "9" * 100_000 + '],"data_offsets":[0,4]}}'
    ),
    "a type that no weight has": lambda kit: safetensors(tensors(a=entry([4], 0, 16, "PICKLE"))),
    "a pickle": lambda kit: kit.pickle,
}  # fmt: skip


def _model(name: str, files: Callable[[Kit], dict[str, bytes | str]], **config: Any) -> Case:
    def make(kit: Kit, folder: Path) -> Path:
        put_json(folder / "model" / "config.json", CONFIG | config)
        for file, content in files(kit).items():
            put(folder / "model" / file, content)
        return folder / "model"

    return Case(f"model directory: {name}", "hugging_face", make)


def _index(*files: str) -> dict[str, bytes | str]:
    weights = {f"t{number}": file for number, file in enumerate(files)}
    return {"model.safetensors.index.json": json.dumps({"weight_map": weights})}


def _code(kit: Kit) -> dict[str, bytes | str]:
    code = f"import os\nos.system({kit.command!r})\n"
    return {
        "modeling_evil.py": code,
        "configuration_evil.py": code,
        "model.safetensors": safetensors("{}"),
    }


def _named_pipe(kit: Kit, folder: Path) -> Path:
    put_json(folder / "model" / "config.json", CONFIG)
    os.mkfifo(folder / "model" / "model.safetensors")
    return folder / "model"


def _endless(kit: Kit, folder: Path) -> Path:
    put(folder / "model" / "model.safetensors", safetensors(tensors(a=entry([4], 0, 16))))
    (folder / "model" / "config.json").symlink_to("/dev/zero")
    return folder / "model"


AUTO = {
    "auto_map": {"AutoConfig": "configuration_evil.C", "AutoModel": "modeling_evil.M"},
    "trust_remote_code": True,
}
MODELS = [
    *(
        _model(f"safetensors, {name}", lambda kit, data=data: {"model.safetensors": data(kit)})
        for name, data in SAFETENSORS.items()
    ),
    _model("pytorch_model.bin alone", lambda kit: {"pytorch_model.bin": kit.pickle}),
    _model("model.pt alone", lambda kit: {"model.pt": kit.pickle}),
    _model("index with ..", lambda kit: _index("../secret.safetensors")),
    _model("index with an absolute name", lambda kit: _index(f"{kit.secret}.safetensors")),
    _model("index with a pipe", lambda kit: _index(f"| {kit.command}.safetensors")),
    _model("index with a pickle", lambda kit: {**_index("model.bin"), "model.bin": kit.pickle}),
    _model("index with a NUL", lambda kit: _index("a\0b.safetensors")),
    _model("index with half of a surrogate pair", lambda kit: _index("\ud800.safetensors")),
    _model("an index beside a single file", lambda kit: {
        **_index("old.safetensors"), "model.safetensors": SOUND, "old.safetensors": SOUND}),
    *(
        _model(f"{key} of {value!r}", lambda kit: {"model.safetensors": SOUND}, **{key: value})
        for key, value in (("rope_parameters", [1]), ("rope_scaling", "abc"), ("head_dim", [1]))
    ),
    *(
        _model(f"{key} of {value!r} in a LLaVA", lambda kit: {"model.safetensors": SOUND},
               **{"model_type": "llava", "text_config": CONFIG, "vision_config": {}, key: value})
        for key in ("text_config", "vision_config")
        for value in (None, [], "abc")
    ),
    _model("index of deep JSON", lambda kit: {"model.safetensors.index.json": deep()}),
    _model("code beside unknown weights", _code, **AUTO, model_type="evil"),
    _model("code beside known weights", _code, **AUTO),
    _model("config.json of deep JSON", lambda kit: {
        "config.json": '{"a": ' + deep() + "}",
        "model.safetensors": safetensors(tensors(a=entry([4], 0, 16)))}),
    _model("10^12 layers", lambda kit: {
        "model.safetensors": safetensors(tensors(a=entry([4], 0, 16)))}, num_hidden_layers=10**12),
    Case("model directory: a named pipe as weights", "hugging_face", _named_pipe),
    Case("model directory: an endless config.json", "hugging_face", _endless),
]  # fmt: skip


def _dataset(name: str, change: Callable[[Kit, Path, dict[str, Any]], Any]) -> Case:
    """A sound dataset with another manifest, whose digest is right."""

    def make(kit: Kit, folder: Path) -> Path:
        path = folder / "set.gvd"
        shutil.copytree(kit.dataset, path)
        document = json.loads((path / "manifest.json").read_bytes())
        change(kit, path, document)
        document["digest"] = document_digest(document)
        put(path / "manifest.json", canonical_json(document))
        return path

    return Case(f"dataset: {name}", "dataset", make)


def _listed(name: str) -> Callable[[Kit, Path, dict[str, Any]], Any]:
    return lambda kit, path, document: document["files"].update(
        {name.format(kit=kit): {"bytes": 1, "sha256": "0" * 64}}
    )


def _other_tokenizer(data: Callable[[Kit], bytes]) -> Callable[[Kit, Path, dict[str, Any]], Any]:
    def change(kit: Kit, path: Path, document: dict[str, Any]) -> None:
        content, name = data(kit), document["tokenizer"]["file"]
        put(path / name, content)
        sha256 = hashlib.sha256(content).hexdigest()
        document["tokenizer"]["sha256"] = sha256
        document["files"][name] = {"bytes": len(content), "sha256": sha256}

    return change


def _whole_manifest(text: Callable[[Kit], bytes]) -> Callable[[Kit, Path], Path]:
    def make(kit: Kit, folder: Path) -> Path:
        shutil.copytree(kit.dataset, folder / "set.gvd")
        put(folder / "set.gvd" / "manifest.json", text(kit))
        return folder / "set.gvd"

    return make


UNWRITABLE = {"NaN": "NaN", "half a surrogate pair": '{"a": "\\ud800"}'}
"""Values that Python's reader of JSON takes and that no manifest can have been written with."""


def _unwritable(schema: str, value: str) -> bytes:
    """A manifest with one of them."""
    return f'{{"schema": "{schema}", "step": 1, "extra": {value}, "digest": ""}}'.encode()


DATASETS = [
    _dataset("a file with ..", _listed("../secret")),
    _dataset("a file with an absolute name", _listed("{kit.secret}")),
    _dataset("a tokenizer outside", lambda kit, path, document: document["tokenizer"].update(
        file=f"../../{kit.secret.name}")),
    _dataset("a pickle as its tokenizer", _other_tokenizer(lambda kit: kit.pickle)),
    _dataset("10^15 samples", lambda kit, path, document: document["counts"].update(
        samples=10**15)),
    Case("dataset: manifest of deep JSON", "dataset", _whole_manifest(lambda kit: deep().encode())),
    Case("dataset: a pickle as manifest", "dataset", _whole_manifest(lambda kit: kit.pickle)),
    *(
        Case(f"dataset: manifest with {name}", "dataset",
             _whole_manifest(lambda kit, value=value: _unwritable("gvd/1", value)))
        for name, value in UNWRITABLE.items()
    ),
    Case("tokenizer: a pickle as .model", "tokenizer_file",
         lambda kit, folder: put(folder / "t.model", kit.pickle)),
    Case("tokenizer: a pickle as .tiktoken", "tokenizer_file",
         lambda kit, folder: put(folder / "t.tiktoken", kit.pickle)),
    Case("tokenizer: deep JSON", "tokenizer_file",
         lambda kit, folder: put(folder / "t.json", '{"model": ' + deep() + "}")),
]  # fmt: skip


def manifest(files: dict[str, Any], parameters: dict[str, Any]) -> bytes:
    """Of a checkpoint, with a right digest."""
    document: dict[str, Any] = {
        "schema": "gvc/1", "serial": 1, "step": 1, "sequences": 1, "layout": {},
        "optimizer_steps": {}, "parameters": parameters, "files": files, "extra": {},
    }  # fmt: skip
    document["digest"] = document_digest(document)
    return canonical_json(document)


def _file(data: bytes, span: list[int]) -> dict[str, Any]:
    return {
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "kind": "weights",
        "rank": 0, "tensor_rank": 0, "slices": {"a": span},
    }  # fmt: skip


WEIGHT = {
    "shape": [4], "dtype": "float32", "module": "llm", "partition_dim": None, "partition_parts": 1
}  # fmt: skip


def _saved(name: str, data: Callable[[Kit], bytes], *, file: str = "llm-00000.safetensors",
           span: tuple[int, int] = (0, 4), **parameter: Any) -> Case:  # fmt: skip
    """A checkpoint whose digests are all right: whoever made it wanted this."""

    def make(kit: Kit, folder: Path) -> Path:
        content = data(kit)
        path = folder / "step-00000001"
        named = file.format(kit=kit)
        if "/" not in named:
            put(path / named, content)
        put(path / "manifest.json", manifest(
            {named: _file(content, list(span))}, {"a": WEIGHT | parameter}))  # fmt: skip
        return path

    return Case(f"checkpoint: {name}", "checkpoint", make)


def _folder(name: str, door: str, files: Callable[[Kit], dict[str, bytes | str]]) -> Case:
    def make(kit: Kit, folder: Path) -> Path:
        for file, content in files(kit).items():
            put(folder / "saved" / file, content)
        return folder / "saved"

    return Case(f"checkpoint: {name}", door, make)


SOUND = safetensors(tensors(a=entry([4], 0, 16)), bytes(16))
CHECKPOINTS = [
    *(
        _saved(f"safetensors, {name}", data)
        for name, data in SAFETENSORS.items()
        if name != "a type that no weight has"
    ),
    _saved("a file with ..", lambda kit: SOUND, file="../llm-00000.safetensors"),
    _saved("a file with an absolute name", lambda kit: SOUND, file="{kit.secret}"),
    _saved("a file of another kind", lambda kit: kit.pickle, file="mp_rank_00_model_states.pt"),
    _saved("a slice beyond the file", lambda kit: SOUND, span=(0, 1 << 40), shape=[1 << 40]),
    _saved("a weight of 2^60 elements", lambda kit: SOUND, shape=[1 << 30, 1 << 30]),
    _folder("torch .distcp with a pickled .metadata", "checkpoint", lambda kit: {
        ".metadata": kit.pickle, "__0_0.distcp": kit.pickle}),
    _folder("DeepSpeed's folder", "checkpoint", lambda kit: {
        "latest": "global_step1", "global_step1/mp_rank_00_model_states.pt": kit.pickle}),
    _folder("Megatron's folder", "checkpoint", lambda kit: {
        "latest_checkpointed_iteration.txt": "1", "iter_0000001/common.pt": kit.pickle}),
    _folder("manifest of deep JSON", "checkpoint", lambda kit: {"manifest.json": deep()}),
    *(
        _folder(f"manifest with {name}", "checkpoint", lambda kit, value=value: {
            "manifest.json": _unwritable("gvc/1", value)})
        for name, value in UNWRITABLE.items()
    ),
    _folder("a run whose only checkpoint is pickles", "run_folder", lambda kit: {
        "latest": "../../outside", "step-00000001/model.pt": kit.pickle}),
    Case("checkpoint: a .pt file", "checkpoint",
         lambda kit, folder: put(folder / "a.pt", kit.pickle)),
]  # fmt: skip


def _gguf(name: str, body: bytes, *, tensors: int = 0, settings: int = 1) -> Case:
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, settings)
    return Case(
        f"GGUF: {name}", "hugging_face", lambda kit, folder: put(folder / "m.gguf", head + body)
    )


KEY = struct.pack("<Q", 1) + b"a"
GGUF = [
    _gguf("2^60 settings", bytes(64), settings=1 << 60),
    _gguf("2^60 tensors", bytes(64), settings=0, tensors=1 << 60),
    _gguf("an array of 2^60 numbers", KEY + struct.pack("<IIQ", 9, 4, 1 << 60) + bytes(64)),
    _gguf("an array of 2^60 texts", KEY + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(64)),
    _gguf("arrays in arrays", KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000),
    _gguf("a text of 2^62 bytes", struct.pack("<Q", 1 << 62) + bytes(64)),
    _gguf("a tensor of 10^9 dimensions", KEY + struct.pack("<I", 10**9) + bytes(64),
          settings=0, tensors=1),
    Case("GGUF: a pickle", "hugging_face",
         lambda kit, folder: put(folder / "m.gguf", kit.pickle)),
]  # fmt: skip

MODEL_CASES = [*GGUF, *MODELS, *DATASETS, *CHECKPOINTS]
