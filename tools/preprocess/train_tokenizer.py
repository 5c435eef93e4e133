"""The command `train-tokenizer`."""

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.readers.registry import SourceSpec, check_settings, source_text
from ghostvis_mega.data.template import ROLES
from ghostvis_mega.data.tokenizer import train_tokenizer
from ghostvis_mega.utils.files import check_free
from tools.preprocess.options import Annotations, Force, Json, print_json


def train_tokenizer_command(
    source: Annotated[str, typer.Option("--from", help="Format of the input; see ingest.")],
    out: Annotated[Path, typer.Option(help="File to write, for example tokenizer.model.")],
    vocab: Annotated[int, typer.Option(help="Tokens wanted; little text may give fewer.")] = 512,
    input_path: Annotated[Path | None, typer.Argument(help="File of rows, or folder.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    annotations: Annotations = None,
    split: Annotated[str, typer.Option(help="Split of a packaged dataset (easy-vqa).")] = "train",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a SentencePiece tokenizer on the text of a source.

    Example: python -m tools.preprocess train-tokenizer --from easy-vqa --vocab 512 --out tok.model
    """
    spec = SourceSpec(
        format=source, path=input_path, images=images, annotations=annotations, split=split
    )
    check_settings(spec)
    check_free(out, force=force)
    tokenizer = train_tokenizer(chain(source_text(spec), ROLES), vocab_size=vocab, path=out)
    if as_json:
        print_json(
            {"file": str(out), "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
        )
    else:
        print(f"{out}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}")
