"""`ghostvis drill`: break things on purpose and watch the run come back; a module each."""

import typer

from ghostvis_mega.cli.drill_corrupt import DRILL_CORRUPT_HELP, drill_corrupt
from ghostvis_mega.cli.drill_crash import DRILL_CRASH_HELP, drill_crash
from ghostvis_mega.cli.drill_goodput import DRILL_GOODPUT_HELP, drill_goodput
from ghostvis_mega.cli.drill_hang import DRILL_HANG_HELP, drill_hang
from ghostvis_mega.cli.drill_hostile import DRILL_HOSTILE_HELP, drill_hostile
from ghostvis_mega.cli.drill_resume import DRILL_RESUME_HELP, drill_resume
from ghostvis_mega.cli.drill_signals import DRILL_SIGNALS_HELP, drill_signals

drill_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Break things on purpose and check that nothing is lost.",
)
drill_app.command("crash", help=DRILL_CRASH_HELP)(drill_crash)
drill_app.command("corrupt", help=DRILL_CORRUPT_HELP)(drill_corrupt)
drill_app.command("resume", help=DRILL_RESUME_HELP)(drill_resume)
drill_app.command("goodput", help=DRILL_GOODPUT_HELP)(drill_goodput)
drill_app.command("hostile", help=DRILL_HOSTILE_HELP)(drill_hostile)
drill_app.command("signals", help=DRILL_SIGNALS_HELP)(drill_signals)
drill_app.command("hang", help=DRILL_HANG_HELP)(drill_hang)
