"""The commands of `python -m tools.preprocess`."""

import logging
import sys

import typer

from ghostvis_mega.utils.errors import GhostVisError
from tools.preprocess import dedupe, export, operations
from tools.preprocess.build import build_command
from tools.preprocess.demo_blend import demo_blend_command
from tools.preprocess.ingest import ingest_command
from tools.preprocess.inspect_packs import inspect_command
from tools.preprocess.plan import plan_command
from tools.preprocess.stats import stats_command
from tools.preprocess.tokenize_dataset import tokenize_command
from tools.preprocess.train_tokenizer import train_tokenizer_command
from tools.preprocess.verify_dataset import verify_command

BAD_INPUT = 2

app = typer.Typer(
    help="Turn raw data into prepared datasets (NAME.gvd).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


app.command("train-tokenizer")(train_tokenizer_command)
app.command("ingest")(ingest_command)
app.command("tokenize")(tokenize_command)
app.command("build")(build_command)
app.command("demo-blend")(demo_blend_command)


app.command("plan")(plan_command)
operations.register(app)
export.register(app)
dedupe.register(app)


app.command("stats")(stats_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 and one sentence for bad input. Usage errors end with SystemExit(2)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(args=arguments)
    except GhostVisError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0
