"""The command `demo-blend`: inputs of the blend example, from two packages on this machine."""

import csv
import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import batched, chain
from pathlib import Path
from typing import Annotated

import typer
import yaml

from ghostvis_mega.data.readers.registry import SourceSpec, source_text
from ghostvis_mega.data.template import ROLES
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import check_free
from tools.preprocess.options import Force

STAMPS = Path("/usr/share/tuxpaint/stamps")


def find_chats() -> Path:
    """The English conversations of chatterbot-corpus; DataError if it is not installed."""
    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "chatterbot-corpus is not installed: .venv/bin/pip install --no-deps chatterbot-corpus"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "english"


def write_captions(stamps: Path, path: Path) -> int:
    """Write image,caption of each X.png with an X.txt, whose first line it is; how many."""
    if not stamps.is_dir():
        raise DataError(f"{stamps} does not exist: apt-get install -y tuxpaint-stamps-default")
    rows = []
    for image in sorted(stamps.rglob("*.png")):
        text = image.with_suffix(".txt")
        if text.is_file():
            caption = text.read_text(encoding="utf-8").partition("\n")[0].strip()
            rows.append((image.relative_to(stamps).as_posix(), caption))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "caption"), *rows])
    return len(rows)


def _conversations(folder: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    for file in sorted(folder.glob("*.yml")):
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        for number, said in enumerate(document["conversations"]):
            messages = []
            # A conversation ends with an answer: what is said last without one is left out.
            for asked, answer in (pair for pair in batched(said, 2) if len(pair) == 2):
                messages.append({"role": "user", "content": str(asked)})
                messages.append({"role": "assistant", "content": str(answer)})
            if messages:
                yield f"{file.stem}/{number}", messages


def write_chats(folder: Path, path: Path) -> int:
    """Write the conversations of a folder of chatterbot's YAML files as JSON lines; how many."""
    lines = [
        json.dumps({"id": key, "messages": messages}) for key, messages in _conversations(folder)
    ]
    if not lines:
        raise DataError(f"{folder} holds no conversations: reinstall chatterbot-corpus")
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def train_shared_tokenizer(folder: Path, *, stamps: Path, vocab: int) -> Tokenizer:
    """One tokenizer for captions, conversations and easy-vqa: blended datasets must share it."""
    specs = (
        SourceSpec(format="csv", path=folder / "stamps.csv", images=stamps),
        SourceSpec(format="chat", path=folder / "chat.jsonl"),
        SourceSpec(format="easy-vqa"),
    )
    # Each text once, or the few questions of easy-vqa, asked thousands of times, take all merges.
    lines = dict.fromkeys(chain.from_iterable(source_text(spec) for spec in specs))
    return train_tokenizer(chain(lines, ROLES), vocab_size=vocab, path=folder / "tokenizer.model")


def demo_blend_command(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("datasets/blend"),
    stamps: Annotated[Path, typer.Option(help="Stamps of Tux Paint.")] = STAMPS,
    chats: Annotated[
        Path | None, typer.Option(help="Folder of chatterbot's YAML; default: the package's.")
    ] = None,
    vocab: Annotated[int, typer.Option(help="Tokens wanted.")] = 1024,
    force: Force = False,
) -> None:
    """Write captions, conversations and a shared tokenizer for examples/recipes. No network.

    Example: python -m tools.preprocess demo-blend --out datasets/blend
    """
    for name in ("stamps.csv", "chat.jsonl", "tokenizer.model"):
        check_free(out / name, force=force)
    captions = write_captions(stamps, out / "stamps.csv")
    conversations = write_chats(chats or find_chats(), out / "chat.jsonl")
    tokenizer = train_shared_tokenizer(out, stamps=stamps, vocab=vocab)
    print(
        f"{out}: {captions} captions, {conversations} conversations, "
        f"tokenizer of {tokenizer.vocab_size} tokens"
    )
