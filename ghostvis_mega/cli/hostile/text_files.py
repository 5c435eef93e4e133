"""Settings, recipes and rows of text that want more than to be read."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ghostvis_mega.cli.hostile.case import Case, Kit, deep, put, put_json

RUN = """\
model: {preset: vlm_tiny}
data: {train: nowhere.gvd, seq_length: 128}
batch: {global_size: 1}
deepspeed: {llm: %s}
train: {steps: 1}
log: {output: run}
"""

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
"""A few lines that unfold to 10^12 values."""


def yaml_cases(door: str) -> list[Case]:
    """YAML that is more than values."""
    texts: dict[str, Callable[[Kit], str]] = {
        "!!python/object/apply": lambda kit: (
            f"model: !!python/object/apply:os.system ['{kit.command}']\n"
        ),
        "!!python/object/new": lambda kit: (
            f"!!python/object/new:subprocess.Popen [[touch, '{kit.canary}']]\n"
        ),
        "!!python/name": lambda kit: "model: !!python/name:os.system\n",
        "!!python/module": lambda kit: "model: !!python/module:os\n",
        "aliases that unfold": lambda kit: LAUGHS + "model: *a11\n",
        "an alias of itself": lambda kit: "model: &a {preset: *a}\n",
        "deep brackets": lambda kit: "model: " + deep(20_000),
        "not UTF-8": lambda kit: "model: \0\ud800",
        "a number of 10^5 digits": lambda kit: f"train: {{steps: {'9' * 100_000}}}\n",
        "an impossible date": lambda kit: "model: 2024-99-99\n",
    }

    def encode(text: Callable[[Kit], str]) -> Callable[[Kit, Path], Path]:
        return lambda kit, folder: put(
            folder / "file.yaml", text(kit).encode("utf-8", "surrogatepass")
        )

    return [Case(f"{door}: {name}", door, encode(text)) for name, text in texts.items()]


def _deepspeed(name: str, text: str) -> Case:
    def make(_: Kit, folder: Path) -> Path:
        settings = put(folder / "ds.json", text)
        return put(folder / "run.yaml", RUN % settings)

    return Case(f"DeepSpeed file: {name}", "settings", make)


DEEPSPEED = [
    _deepspeed("deep JSON", '{"zero_optimization": ' + deep() + "}"),
    _deepspeed(
        "a number of 10^5 digits", '{"zero_optimization": {"stage": ' + "9" * 100_000 + "}}"
    ),
    _deepspeed("a pickle", "cposix\nsystem\n(Vtrue\ntR."),
]


def _turns(image: Any) -> dict[str, Any]:
    asked = {"from": "human", "value": "<image>\nWhat is it?"}
    return {"id": "1", "image": image, "conversations": [asked, {"from": "gpt", "value": "It."}]}


def _llava(name: str, row: Callable[[Kit], Any]) -> Case:
    return Case(
        f"llava rows: {name}",
        "rows",
        lambda kit, folder: put_json(folder / "llava" / "rows.json", [row(kit)]),
    )


def _linked_picture(kit: Kit, folder: Path) -> Path:
    # Into the folder of pictures that the door names.
    link = kit.tokenizer.parent / "images" / "link.png"
    if not link.is_symlink():
        link.symlink_to(kit.secret)
    return put_json(folder / "llava" / "rows.json", [_turns("link.png")])


LLAVA = [
    _llava("http address", lambda kit: _turns("http://127.0.0.1:9/picture.png")),
    _llava("https address", lambda kit: _turns("https://example.invalid/picture.png")),
    _llava("file address", lambda kit: _turns(f"file://{kit.secret}")),
    _llava("data address", lambda kit: _turns("data:image/png;base64,AAAA")),
    _llava("absolute name", lambda kit: _turns(str(kit.secret))),
    _llava("name with ..", lambda kit: _turns(os.path.join("..", kit.secret.name))),
    _llava("name with a zero byte", lambda kit: _turns("a.png\0.txt")),
    _llava("name that is a list", lambda kit: _turns([["a.png"]])),
    _llava("a pipe to a command", lambda kit: _turns(f"| {kit.command}")),
    Case("llava rows: link out of the folder", "rows", _linked_picture),
    Case(
        "llava rows: deep JSON",
        "rows",
        lambda kit, folder: put(folder / "llava" / "rows.json", "[" + deep() + "]"),
    ),
    Case(
        "llava rows: deep JSON lines",
        "rows",
        lambda kit, folder: put(folder / "llava" / "rows.jsonl", deep() + "\n"),
    ),
    Case(
        "llava rows: a pickle",
        "rows",
        lambda kit, folder: put(folder / "llava" / "rows.json", kit.pickle),
    ),
    Case(
        "csv rows: http address",
        "rows",
        lambda kit, folder: put(
            folder / "csv" / "rows.csv", "image,caption\nhttp://127.0.0.1:9/a.png,a\n"
        ),
    ),
    Case(
        "csv rows: name with ..",
        "rows",
        lambda kit, folder: put(
            folder / "csv" / "rows.csv", f"image,caption\n../../{kit.secret.name},a\n"
        ),
    ),
    Case(
        "chat rows: deep JSON",
        "rows",
        lambda kit, folder: put(folder / "chat" / "rows.json", '[{"messages": ' + deep() + "}]"),
    ),
    Case(
        "chat rows: parquet that is none",
        "rows",
        lambda kit, folder: put(folder / "chat" / "rows.parquet", b"PAR1" + kit.pickle + b"PAR1"),
    ),
]


def _pipe(_: Kit, folder: Path) -> Path:
    """What never ends, where a file is wanted."""
    os.mkfifo(folder / "file.yaml")
    return folder / "file.yaml"


def _picture_pipe(kit: Kit, folder: Path) -> Path:
    os.mkfifo(kit.tokenizer.parent / "images" / "pipe.png")
    return put_json(folder / "llava" / "rows.json", [_turns("pipe.png")])


def _tar_pipe(_: Kit, folder: Path) -> Path:
    (folder / "webdataset").mkdir()
    os.mkfifo(folder / "webdataset" / "a.tar")
    return folder / "webdataset" / "a.tar"


def _parquet_bomb(_: Kit, folder: Path) -> Path:
    """Some kilobytes that hold one text of half a gigabyte."""
    import pyarrow
    from pyarrow import parquet

    path = folder / "text" / "rows.parquet"
    path.parent.mkdir(parents=True)
    column = pyarrow.array(["a" * (1 << 29)])
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
    return path


def _megatron(name: str, idx: bytes) -> Case:
    def make(_: Kit, folder: Path) -> Path:
        put(folder / "megatron" / "a.bin", bytes(64))
        put(folder / "megatron" / "a.idx", idx)
        return folder / "megatron" / "a"

    return Case(f"megatron rows: {name}", "rows", make)


def _index(sequences: int, documents: int, body: bytes = b"") -> bytes:
    return struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, sequences, documents) + body


MEGATRON = [
    _megatron("counts of 2^62", _index(1 << 62, 1 << 62)),
    _megatron("lengths below zero", _index(1, 2, struct.pack("<iqqq", -5, 0, 0, 1))),
    _megatron("lengths beyond the file", _index(1, 2, struct.pack("<iqqq", 1 << 30, 0, 0, 1))),
    _megatron("documents that go back", _index(1, 2, struct.pack("<iqqq", 16, 0, 1, 0))),
]


def _prompts(name: str, row: Callable[[Kit, Path], Any]) -> Case:
    return Case(
        f"prompts: {name}",
        "prompts",
        lambda kit, folder: put_json(folder / "prompts.jsonl", row(kit, folder)),
    )


def _shows(image: str) -> dict[str, Any]:
    return {"prompt": "What is it?", "images": [image]}


def _shows_pipe(_: Kit, folder: Path) -> Any:
    os.mkfifo(folder / "pipe.png")
    return _shows("pipe.png")


PROMPTS = [
    _prompts("http address", lambda kit, folder: _shows("http://127.0.0.1:9/picture.png")),
    _prompts("file address", lambda kit, folder: _shows(f"file://{kit.secret}")),
    _prompts("a text as picture", lambda kit, folder: _shows(str(kit.secret))),
    _prompts("an endless picture", lambda kit, folder: _shows("/dev/zero")),
    _prompts("a named pipe as picture", _shows_pipe),
    _prompts("a command", lambda kit, folder: {"prompt": "a", "trust_remote_code": kit.command}),
    Case("prompts: deep JSON", "prompts", lambda kit, folder: put(folder / "p.jsonl", deep())),
    Case("prompts: a pickle", "prompts", lambda kit, folder: put(folder / "p.jsonl", kit.pickle)),
]

TEXT_CASES = [
    *PROMPTS,
    *yaml_cases("settings"),
    *yaml_cases("recipe"),
    *DEEPSPEED,
    *LLAVA,
    Case("text rows: parquet that unfolds", "rows", _parquet_bomb),
    Case("llava rows: a named pipe as picture", "rows", _picture_pipe),
    Case("tar: a named pipe", "rows", _tar_pipe),
    Case("settings: a named pipe", "settings", _pipe),
    Case("recipe: a named pipe", "recipe", _pipe),
    *MEGATRON,
]
