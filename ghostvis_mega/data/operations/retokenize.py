"""The same conversations and documents with another tokenizer or chat template."""

from pathlib import Path

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import DryRun, Progress, Source, dry_run, make_spec, store_rows
from ghostvis_mega.data.manifest import Manifest, read_manifest
from ghostvis_mega.data.recover import irreversible, recover_rows
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.writer import DatasetWriter
from ghostvis_mega.utils.errors import DataError


def _sources(dataset: Dataset, *, accept_normalized: bool) -> list[Source]:
    """One stream of rows for each source of the parent."""
    reason = irreversible(dataset.tokenizer)
    if reason is not None and not accept_normalized:
        raise DataError(
            f"{dataset.path} keeps its text as tokens, and they need not give back what was "
            f"ingested: {reason}. Ingest the source again with the new tokenizer, or accept the "
            "text as the old tokenizer saw it with --accept-normalized"
        )
    return [
        Source(source.name, recover_rows(dataset, number), source.license)
        for number, source in enumerate(dataset.manifest.sources)
    ]


def retokenize(
    dataset: Dataset,
    *,
    tokenizer: Tokenizer,
    template: str,
    path: Path,
    force: bool = False,
    workers: int = 1,
    max_tokens: int | None = None,
    accept_normalized: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write `dataset` to `path` with the tokens of `tokenizer`; its pictures are shared.

    The text is what the old tokens decode to; a sample whose text cannot be had back is in the
    ledger.

    Args:
        tokenizer: loaded with the specials of `template`.
        max_tokens: cut documents, not conversations, to at most so many.
        accept_normalized: take the decoded text though the old tokenizer normalised it.

    Raises:
        DataError: `path` is taken, the parent is damaged, or its tokenizer is not reversible.
    """
    sources = _sources(dataset, accept_normalized=accept_normalized)
    if path.resolve() == dataset.path.resolve():
        raise DataError(f"{path} is read and cannot be written: give another name")
    spec = make_spec(tokenizer, template, max_tokens)
    described = [
        {
            "name": source.name,
            "license": source.license,
            "parent": dataset.manifest.digest,
            "operation": f"tokenize template={template} max_tokens={max_tokens}",
        }
        for source in sources
    ]
    with DatasetWriter(
        path,
        tokenizer=tokenizer,
        template=template,
        sources=described,
        force=force,
        media=dataset.path,
    ) as writer:
        store_rows(sources, writer, spec=spec, workers=workers, progress=progress)
    return read_manifest(path)


def count(
    dataset: Dataset,
    *,
    tokenizer: Tokenizer,
    template: str,
    workers: int = 1,
    max_tokens: int | None = None,
    accept_normalized: bool = False,
    progress: Progress | None = None,
) -> DryRun:
    """Do all that `retokenize` does but write."""
    return dry_run(
        _sources(dataset, accept_normalized=accept_normalized),
        tokenizer=tokenizer,
        template=template,
        progress=progress,
        workers=workers,
        max_tokens=max_tokens,
    )
