"""The command `ingest`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.ingest import DryRun, Source, dry_run, ingest
from ghostvis_mega.data.manifest import Manifest
from ghostvis_mega.data.readers.meter import Meters
from ghostvis_mega.data.readers.registry import FORMATS, SourceSpec, check_settings, open_source
from ghostvis_mega.data.readers.vqa import CAPTION_PROMPT
from ghostvis_mega.data.styles import STYLES
from ghostvis_mega.data.template import TEMPLATE_NAME, load_tokenizer
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError
from tools.preprocess.options import (
    Annotations,
    DryRunOption,
    Force,
    Images,
    Json,
    Limit,
    MaxTokens,
    Workers,
    print_json,
)
from tools.preprocess.progress import Progress

_FORMAT_HELP = "; ".join(f"{name}: {found.help}" for name, found in FORMATS.items())


def ingest_command(
    fmt: Annotated[str, typer.Argument(metavar="FORMAT", help=_FORMAT_HELP)],
    tokenizer: Annotated[
        Path, typer.Option(help="SentencePiece model, tokenizer.json or .tiktoken ranks.")
    ],
    out: Annotated[Path | None, typer.Option(help="Directory to make, as train.gvd.")] = None,
    input_path: Annotated[Path | None, typer.Argument(help="File of rows, or folder.")] = None,
    images: Images = None,
    annotations: Annotations = None,
    split: Annotated[str, typer.Option(help="Split of a packaged dataset (easy-vqa).")] = "train",
    prompt: Annotated[str, typer.Option(help="Question that captions answer.")] = CAPTION_PROMPT,
    template: Annotated[str, typer.Option(help=f"Chat template: {', '.join(STYLES)}.")] = (
        TEMPLATE_NAME
    ),
    max_tokens: MaxTokens = None,
    limit: Limit = None,
    workers: Workers = 1,
    dry: DryRunOption = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Read rows, check and store pictures and tokens; what is dropped is in rejects.jsonl.

    The same input gives the same bytes; a stopped ingest leaves nothing at OUT.

    Example: python -m tools.preprocess ingest easy-vqa --tokenizer tok.model --out train.gvd

    Example: python -m tools.preprocess ingest llava rows.json --images photos
    --tokenizer tok.model --out sft.gvd

    Example: python -m tools.preprocess ingest vqav2 v2_OpenEnded_mscoco_train2014_questions.json
    --annotations v2_mscoco_train2014_annotations.json --images train2014
    --tokenizer tokenizer.json --template llama3 --workers 8 --out vqav2.gvd
    """
    spec = SourceSpec(
        format=fmt, path=input_path, images=images, annotations=annotations, split=split,
        limit=limit, prompt=prompt, tokenizer=tokenizer,
    )  # fmt: skip
    check_settings(spec)
    meters = Meters()
    sources = [open_source(spec, meters)]
    loaded = load_tokenizer(tokenizer, template=template)
    if dry:
        progress = Progress(total=limit, meters=meters)
        _dry_run(sources, loaded, template, max_tokens, workers, progress, as_json=as_json)
        return
    if out is None:
        raise DataError("--out is needed: the directory to make, or --dry-run to write nothing")
    progress = Progress(total=limit, meters=meters)
    manifest = ingest(
        sources, tokenizer=loaded, path=out, template=template, force=force, progress=progress,
        workers=workers, max_tokens=max_tokens,
    )  # fmt: skip
    progress.end()
    report_ingest(manifest, out, as_json=as_json)
    _check_stored(manifest.counts.samples, manifest.counts.rejected)


def _check_stored(samples: int, rejected: int) -> None:
    """DataError if all was for nothing, so that a script does not go on."""
    if samples == 0:
        raise DataError(f"no sample came of the input: all {rejected} rows were rejected")


def _dry_run(
    sources: list[Source],
    tokenizer: Tokenizer,
    template: str,
    max_tokens: int | None,
    workers: int,
    progress: Progress,
    *,
    as_json: bool,
) -> None:
    found = dry_run(
        sources, tokenizer=tokenizer, template=template, progress=progress, workers=workers,
        max_tokens=max_tokens,
    )  # fmt: skip
    progress.end()
    report_dry_run(found, as_json=as_json)
    _check_stored(found.samples, found.rows)


def report_dry_run(
    found: DryRun,
    *,
    as_json: bool,
    would_make: tuple[str, ...] | None = None,
    deduped: bool = False,
) -> None:
    """What would have been written.

    Args:
        would_make: outputs that a build would make; None for other commands.
        deduped: the counts are before dedupe, which would come next.
    """
    if as_json:
        build = {} if would_make is None else {"would_make": would_make, "before_dedupe": deduped}
        print_json(asdict(found) | build)
        return
    print(
        f"{found.rows} rows would give {found.samples} samples, {found.images} images, "
        f"{found.tokens} tokens ({found.trained_tokens} trained)"
        f"{' before dedupe' if deduped else ''}; nothing was written"
    )
    for reason, count in found.rejected.items():
        print(f"  rejected: {reason} {count}")
    if would_make is not None:
        print(f"  would make: {', '.join(would_make) or 'nothing, all is up to date'}")


def report_ingest(manifest: Manifest, out: Path, *, as_json: bool) -> None:
    """What a finished dataset holds."""
    counts = manifest.counts
    if as_json:
        print_json({"path": str(out), "digest": manifest.digest, **counts.model_dump()})
        return
    print(
        f"{out}: {counts.samples} samples, {counts.images} images, {counts.tokens} tokens "
        f"({counts.trained_tokens} trained), {counts.rejected} rows rejected"
    )
