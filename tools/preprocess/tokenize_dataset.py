"""The command `tokenize`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.operations.retokenize import count, retokenize
from ghostvis_mega.data.styles import STYLES
from ghostvis_mega.data.template import load_tokenizer
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.ingest import report_dry_run, report_ingest
from tools.preprocess.options import DatasetPath, DryRunOption, Force, Json, MaxTokens, Workers
from tools.preprocess.progress import Progress


def tokenize_command(
    dataset: DatasetPath,
    tokenizer: Annotated[
        Path, typer.Option(help="SentencePiece model, tokenizer.json or .tiktoken ranks.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="NAME.gvd", help="Dataset to make.")] = None,
    template: Annotated[
        str | None, typer.Option(help=f"Chat template, else the old one: {', '.join(STYLES)}.")
    ] = None,
    max_tokens: MaxTokens = None,
    accept_normalized: Annotated[
        bool,
        typer.Option(
            "--accept-normalized",
            help="Take the text as the old tokenizer saw it (NFC, for example), not as ingested.",
        ),
    ] = False,
    workers: Workers = 1,
    dry: DryRunOption = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a dataset again with another tokenizer or chat template; pictures are shared.

    The text is what the old tokens decode to. Where the old tokenizer cannot promise that this is
    the ingested text, the command says why and stops; what cannot be decoded is in rejects.jsonl.

    Example: python -m tools.preprocess tokenize sft.gvd --tokenizer tokenizer.json
    --template llama3 --workers 8 --out sft-llama3.gvd
    """
    if out is None and not dry:
        raise DataError("--out is needed: the directory to make, or --dry-run to write nothing")
    with Dataset.open(dataset) as opened:
        style = template or opened.manifest.template.name
        progress = Progress(total=opened.num_samples)
        options = {
            "tokenizer": load_tokenizer(tokenizer, template=style),
            "template": style,
            "workers": workers,
            "max_tokens": max_tokens,
            "accept_normalized": accept_normalized,
            "progress": progress,
        }
        if dry or out is None:
            found = count(opened, **options)
            progress.end()
            report_dry_run(found, as_json=as_json)
            return
        manifest = retokenize(opened, path=out, force=force, **options)
    progress.end()
    report_ingest(manifest, out, as_json=as_json)
