"""`ghostvis drill`: break things on purpose and watch the run come back; a module each."""

import typer

drill_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Break things on purpose and check that nothing is lost.",
)
