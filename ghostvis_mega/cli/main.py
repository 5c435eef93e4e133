"""All commands under one name. They import what they need when they run, so that `check` stays
quick."""

import typer

from ghostvis_mega.cli.bench_checkpoint import BENCH_CHECKPOINT_HELP, bench_checkpoint
from ghostvis_mega.cli.bench_convert import BENCH_CONVERT_HELP, bench_convert
from ghostvis_mega.cli.bench_data import BENCH_DATA_HELP, bench_data
from ghostvis_mega.cli.bench_determinism import BENCH_DETERMINISM_HELP, bench_determinism
from ghostvis_mega.cli.bench_fp8 import BENCH_FP8_HELP, bench_fp8
from ghostvis_mega.cli.bench_generate import BENCH_GENERATE_HELP, bench_generate
from ghostvis_mega.cli.bench_guards import BENCH_GUARDS_HELP, bench_guards
from ghostvis_mega.cli.bench_longest import BENCH_LONGEST_HELP, bench_longest
from ghostvis_mega.cli.bench_loss import BENCH_LOSS_HELP, bench_loss
from ghostvis_mega.cli.bench_memory import BENCH_MEMORY_HELP, bench_memory
from ghostvis_mega.cli.bench_train import BENCH_TRAIN_HELP, bench_train
from ghostvis_mega.cli.certify import CERTIFY_HELP, certify
from ghostvis_mega.cli.check import CHECK_HELP, check
from ghostvis_mega.cli.ckpt import ckpt_app
from ghostvis_mega.cli.convert import convert_app
from ghostvis_mega.cli.drill import drill_app
from ghostvis_mega.cli.generate import GENERATE_HELP, generate
from ghostvis_mega.cli.gradients import GRADIENTS_HELP, gradients
from ghostvis_mega.cli.leak import LEAK_HELP, leak
from ghostvis_mega.cli.simulate_dispatch import SIMULATE_DISPATCH_HELP, simulate_dispatch
from ghostvis_mega.cli.stress import STRESS_HELP, stress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="GhostVis-Mega: train vision-language models with Megatron-Core and DeepSpeed.",
)
app.command(help=CHECK_HELP)(check)
app.command(help=CERTIFY_HELP)(certify)
app.command(help=GENERATE_HELP)(generate)
app.command(help=GRADIENTS_HELP)(gradients)
app.command(help=LEAK_HELP)(leak)
app.command(help=STRESS_HELP)(stress)

bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Time parts of the system against bars."
)
bench_app.command("checkpoint", help=BENCH_CHECKPOINT_HELP)(bench_checkpoint)
bench_app.command("convert", help=BENCH_CONVERT_HELP)(bench_convert)
bench_app.command("data", help=BENCH_DATA_HELP)(bench_data)
bench_app.command("determinism", help=BENCH_DETERMINISM_HELP)(bench_determinism)
bench_app.command("fp8", help=BENCH_FP8_HELP)(bench_fp8)
bench_app.command("generate", help=BENCH_GENERATE_HELP)(bench_generate)
bench_app.command("guards", help=BENCH_GUARDS_HELP)(bench_guards)
bench_app.command("longest", help=BENCH_LONGEST_HELP)(bench_longest)
bench_app.command("loss", help=BENCH_LOSS_HELP)(bench_loss)
bench_app.command("memory", help=BENCH_MEMORY_HELP)(bench_memory)
bench_app.command("train", help=BENCH_TRAIN_HELP)(bench_train)
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")
app.add_typer(ckpt_app, name="ckpt")

simulate_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Plan for large worlds without any process."
)
simulate_app.command("dispatch", help=SIMULATE_DISPATCH_HELP)(simulate_dispatch)
app.add_typer(simulate_app, name="simulate")
app.add_typer(drill_app, name="drill")


def main() -> None:
    """Entry point of `ghostvis`."""
    app(prog_name="ghostvis")
