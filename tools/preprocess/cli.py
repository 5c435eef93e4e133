"""The commands of `python -m tools.preprocess`."""

import json
import logging
import sys
import time
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Source
from ghostvis_mega.data.ingest import ingest as run_ingest
from ghostvis_mega.data.manifest import Manifest
from ghostvis_mega.data.plan import PlanParams, build_plan, save_plan
from ghostvis_mega.data.readers.easy_vqa import easy_vqa_source, easy_vqa_text
from ghostvis_mega.data.readers.llava import llava_source, llava_text
from ghostvis_mega.data.template import ROLES
from ghostvis_mega.data.tokenizer import Tokenizer, train_tokenizer
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import DataError, GhostVisError
from tools.preprocess import dedupe, export, operations
from tools.preprocess.inspect_packs import inspect_command
from tools.preprocess.stats import stats_command

BAD_INPUT = 2
FOUND_PROBLEMS = 1

app = typer.Typer(
    help="Turn raw data into prepared datasets (NAME.gvd).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Format(StrEnum):
    """Input formats."""

    EASY_VQA = "easy-vqa"
    LLAVA = "llava"


class Split(StrEnum):
    """Splits that a packaged dataset has."""

    TRAIN = "train"
    TEST = "test"


class Packing(StrEnum):
    """Packing algorithms."""

    BALANCED = "balanced"
    BFD = "bfd"
    NONE = "none"


DatasetPath = Annotated[Path, typer.Argument(metavar="NAME.gvd", help="A prepared dataset.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
SplitOption = Annotated[Split, typer.Option(help="Split of a packaged dataset (easy-vqa).")]
InputArgument = Annotated[Path | None, typer.Argument(help="File of rows (llava).")]
SeqLength = Annotated[int, typer.Option(min=1, help="Positions of one sequence.")]
TokensPerImage = Annotated[int, typer.Option(min=1, help="Positions that one image takes.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the plan; train.seed of the run.")]


def _require(value: Path | None, *, what: str, fmt: Format) -> Path:
    if value is None:
        raise DataError(f"the format {fmt} needs {what}")
    return value


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


@app.command("train-tokenizer")
def train_tokenizer_command(
    source: Annotated[Format, typer.Option("--from", help="Where the text comes from.")],
    out: Annotated[Path, typer.Option(help="File to write, for example tokenizer.model.")],
    vocab: Annotated[int, typer.Option(help="Tokens wanted; little text may give fewer.")] = 512,
    input_path: InputArgument = None,
    split: SplitOption = Split.TRAIN,
    as_json: Json = False,
) -> None:
    """Train a SentencePiece tokenizer on the text of a source.

    Example: python -m tools.preprocess train-tokenizer --from easy-vqa --vocab 512 --out tok.model
    """
    if source is Format.EASY_VQA:
        lines = easy_vqa_text(split.value)
    else:
        lines = llava_text(_require(input_path, what="a file of rows", fmt=source))
    tokenizer = train_tokenizer(chain(lines, ROLES), vocab_size=vocab, path=out)
    if as_json:
        _print_json(
            {"file": str(out), "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
        )
    else:
        print(f"{out}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}")


@app.command("ingest")
def ingest_command(
    fmt: Annotated[Format, typer.Argument(metavar="FORMAT", help="easy-vqa or llava.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer file (see train-tokenizer).")],
    out: Annotated[Path, typer.Option(help="Directory to make, for example train.gvd.")],
    input_path: InputArgument = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images (llava).")] = None,
    split: SplitOption = Split.TRAIN,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first rows only.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a dataset that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Read rows, check and store pictures and tokens; what is dropped is in rejects.jsonl.

    The same input gives the same bytes; a stopped ingest leaves nothing at OUT.

    Example: python -m tools.preprocess ingest easy-vqa --tokenizer tok.model --out train.gvd

    Example: python -m tools.preprocess ingest llava rows.json --images photos
    --tokenizer tok.model --out sft.gvd
    """
    if fmt is Format.EASY_VQA:
        source: Source = easy_vqa_source(split.value, limit=limit)
    else:
        rows = _require(input_path, what="a file of rows", fmt=fmt)
        source = llava_source(rows, image_folder=images, limit=limit)
    started = time.monotonic()

    def progress(count: int, rejected: int) -> None:
        rate = count / (time.monotonic() - started)
        print(f"{count} rows, {rejected} rejected, {rate:.0f} rows/s", file=sys.stderr)

    manifest = run_ingest(
        [source], tokenizer=Tokenizer.load(tokenizer), path=out, force=force, progress=progress
    )
    _report_ingest(manifest, out, as_json=as_json)


def _report_ingest(manifest: Manifest, out: Path, *, as_json: bool) -> None:
    counts = manifest.counts
    if as_json:
        _print_json({"path": str(out), "digest": manifest.digest, **counts.model_dump()})
        return
    print(
        f"{out}: {counts.samples} samples, {counts.images} images, {counts.tokens} tokens "
        f"({counts.trained_tokens} trained), {counts.rejected} rows rejected"
    )


@app.command("plan")
def plan_command(
    dataset: DatasetPath,
    seq_length: SeqLength,
    tokens_per_image: TokensPerImage,
    seed: Seed = 0,
    algorithm: Annotated[Packing, typer.Option(help="How samples share sequences.")] = (
        Packing.BALANCED
    ),
    group_images: Annotated[bool, typer.Option(help="Keep samples of one picture together.")] = (
        True
    ),
    as_json: Json = False,
) -> None:
    """Pack a dataset and store the plan inside it; training with the same settings uses it.

    Example: python -m tools.preprocess plan train.gvd --seq-length 1024 --tokens-per-image 16
    """
    params = PlanParams(
        algorithm=algorithm.value,
        seq_length=seq_length,
        tokens_per_image=tokens_per_image,
        seed=seed,
        group_images=group_images,
    )
    with Dataset.open(dataset) as opened:
        started = time.monotonic()
        plan = build_plan(opened, params)
        seconds = time.monotonic() - started
        directory = save_plan(opened, plan)
    if as_json:
        _print_json(
            {
                "path": str(directory),
                "packs": plan.num_packs,
                "fill": plan.fill,
                "dropped": len(plan.dropped),
                "seconds": round(seconds, 3),
            }
        )
        return
    print(
        f"{directory}: {len(plan.samples)} samples in {plan.num_packs} sequences, "
        f"{100 * plan.fill:.2f} % full, {len(plan.dropped)} too long, {seconds:.2f} s"
    )


@app.command("verify")
def verify_command(
    dataset: DatasetPath,
    deep: Annotated[bool, typer.Option(help="Also decode every image and check every record.")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Compare every byte with the manifest; ends with 1 if something is wrong.

    Example: python -m tools.preprocess verify train.gvd --deep
    """
    if not dataset.is_dir():
        raise DataError(f"{dataset} is not a directory")
    problems = verify_dataset(dataset, deep=deep)
    if as_json:
        _print_json({"ok": not problems, "problems": problems})
    else:
        print("\n".join(problems) if problems else f"{dataset}: every byte is as written")
    if problems:
        raise typer.Exit(FOUND_PROBLEMS)


operations.register(app)
export.register(app)
dedupe.register(app)


app.command("stats")(stats_command)
app.command("inspect")(inspect_command)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 and one sentence for bad input. Usage errors end with SystemExit(2)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(args=arguments)
    except GhostVisError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0
