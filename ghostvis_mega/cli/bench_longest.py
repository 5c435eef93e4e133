"""`ghostvis bench longest`: the longest sequence that fits into memory, by trying."""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_mega.cli.bench_memory import split_mode
from ghostvis_mega.cli.bench_train import SIGNALLED, TARGET, load_rows
from ghostvis_mega.cli.output import AsJson, conclude, print_rows, refusing_settings, scratch
from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.train_bench.launches import Order, run_row
from ghostvis_mega.perf.train_bench.longest import (
    LENGTHS_OF,
    STEPS,
    Mode,
    Search,
    Try,
    default_modes,
    figures_of,
    find_longest,
    need_of,
    prediction,
    row_of,
    settings_of,
)
from ghostvis_mega.perf.train_bench.plans import Plan
from ghostvis_mega.perf.train_bench.progress import Stopped, stopping, summary_lines
from ghostvis_mega.perf.train_bench.results import RowResult
from ghostvis_mega.utils.errors import ConfigError, DataError
from ghostvis_mega.utils.figures import Figure
from ghostvis_mega.utils.files import canonical_json, write_output
from ghostvis_mega.utils.hardware import has_cuda_device
from ghostvis_mega.utils.logging import setup_logging

log = logging.getLogger(__name__)

BENCH_LONGEST_HELP = f"""The longest sequence that trains in the memory there is, mode by mode.

\\b
Examples:
  python -m ghostvis_mega bench longest --size 1.5b
  python -m ghostvis_mega bench longest --size 7b --processes 4 --json
  python -m ghostvis_mega bench longest --size 7b --processes 4 \\
    --mode "context: parallel.tensor=2 parallel.context=2 train.recompute=full"
  python -m ghostvis_mega bench longest --size tiny --from 128 --to 256 --grain 64   # no GPU needed

\\b
Each try is a launch of its own that trains {STEPS} steps on one sequence of random tokens, one
sample long, for each replica. A mode is NAME: followed by settings; without any, less and less is
kept on the device: nothing saved, MLPs run again, layers run again, the optimizer on the host.
Sizes: {", ".join(LENGTHS_OF)}.
Exit code: 0 measured, 1 a try failed for something else than memory, 2 wrong settings,
128 + n stopped by signal n.
"""


def bench_longest(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    size: Annotated[str, typer.Option(help="Of the model.")] = "1.5b",
    processes: Annotated[int, typer.Option(min=1, help="Ranks of each try.")] = 1,
    mode: Annotated[
        list[str] | None, typer.Option(help='"NAME: settings"; repeatable.', show_default=False)
    ] = None,
    first: Annotated[int, typer.Option("--from", min=1, help="Length to begin with.")] = 16_384,
    most: Annotated[int, typer.Option("--to", min=1, help="Longest to try.")] = 2**20,
    grain: Annotated[int, typer.Option(min=1, help="Lengths are multiples of it.")] = 1024,
    try_timeout: Annotated[float, typer.Option(min=1, help="Seconds for each try.")] = 300.0,
    save: Annotated[
        Path | None, typer.Option(help="JSON file, rewritten after each mode.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check all modes, then search for one after the other."""
    setup_logging(rank=0)
    with scratch("bench-longest", None) as folder:
        with refusing_settings():
            search = Search(first=first, most=most, grain=grain)
            modes = [Mode(name, tuple(more)) for name, more in map(split_mode, mode or ())]
            bench = _Longest(
                size=size,
                processes=processes,
                overrides=tuple(overrides or ()),
                folder=folder,
                try_timeout_s=try_timeout,
                save=save,
            )
            modes = modes or default_modes(size, processes)
            bench.check(modes, search)
        number = bench.run(modes, search)
        rows = bench.figures(modes)
    if number:
        print_rows(rows, title="stopped", as_json=as_json)
        raise typer.Exit(SIGNALLED + number)
    conclude(rows, title=f"longest sequence, {size}, {processes} processes", as_json=as_json)


@dataclasses.dataclass
class _Longest:
    """One call of the command."""

    size: str
    processes: int
    overrides: tuple[str, ...]
    folder: Path
    try_timeout_s: float
    save: Path | None
    tries: list[tuple[Mode, Try]] = dataclasses.field(default_factory=list)

    def check(self, modes: Sequence[Mode], search: Search) -> None:
        """Refuse wrong settings of any mode before the first try.

        Raises:
            ConfigError: With the problems of all modes.
        """
        if self.size not in LENGTHS_OF:
            raise ConfigError([f"--size {self.size} is unknown. Use {', '.join(LENGTHS_OF)}."])
        if not search.grain <= search.first <= search.most:
            raise ConfigError(
                [
                    f"--grain {search.grain}, --from {search.first} and --to {search.most} fall in "
                    "this order. Let each be at least the one before."
                ]
            )
        names = [mode.name for mode in modes]
        problems = [
            f"two modes are called {n!r}." for n in dict.fromkeys(names) if names.count(n) > 1
        ]
        for mode in modes:
            try:
                self._order(mode, search.following([]), number=0)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        self._keep(modes)

    def run(self, modes: Sequence[Mode], search: Search) -> int:
        """Search for one mode after the other; 0, or the number of the signal that stopped it."""
        try:
            with stopping():
                for mode in modes:
                    self._search(mode, search)
                    self._keep(modes)
        except Stopped as stop:
            log.error("%s", stop)
            return stop.number
        return 0

    def figures(self, modes: Sequence[Mode]) -> list[Figure]:
        return [
            figure
            for mode in modes
            for figure in figures_of(mode, [one for of, one in self.tries if of == mode])
        ]

    def _keep(self, modes: Sequence[Mode]) -> None:
        if self.save is None:
            return
        content = {
            "figures": self.figures(modes),
            "tries": [dataclasses.asdict(one.result) for _, one in self.tries],
        }
        try:
            write_output(self.save, canonical_json(content))
        except DataError as error:
            raise ConfigError([f"--save: {error}."]) from error

    def _search(self, mode: Mode, search: Search) -> None:
        run, replicas, _ = self._settled(mode)
        search = dataclasses.replace(
            search, predicted=prediction(run, processes=self.processes, replicas=replicas)
        )
        for one in find_longest(search, lambda length: self._attempt(mode, length)):
            self.tries.append((mode, one))
            for line in summary_lines(one.result):
                log.info("%s: %s", one.result.name, line)

    def _attempt(self, mode: Mode, length: int) -> RowResult:
        order = self._order(mode, length, number=len(self.tries))
        device = "cuda" if order.run.train.device != "cpu" and has_cuda_device() else "cpu"
        return run_row(
            order,
            target=TARGET,
            processes=self.processes,
            timeout_s=self.try_timeout_s,
            device=device,
        )

    def _settled(self, mode: Mode) -> tuple[RunConfig, int, Path]:
        """A mode's settings for any length, its replicas, and the file of the size."""
        file = Plan(settings=settings_of(self.size)).write(self.folder)
        run = load_run_config(file, [*self.overrides, *mode.settings])
        split = run.parallel
        replicas = max(1, self.processes // (split.tensor * split.pipeline * split.context))
        return run, replicas, file

    def _order(self, mode: Mode, length: int, *, number: int) -> Order:
        """What a try is told; its data are written, those of the try before removed."""
        run, replicas, file = self._settled(mode)
        data = self.folder / "data"
        need = need_of(length, replicas=replicas, vocab_size=run.model.llm.vocab_size, folder=data)
        row = row_of(mode, need, replicas=replicas)
        if not need.path.exists():
            from ghostvis_mega.perf.train_bench.data import write_text

            shutil.rmtree(data, ignore_errors=True)
            write_text(need)
        (run,) = load_rows(
            file,
            self.overrides,
            [row],
            folder=self.folder,
            processes=self.processes,
            steps=STEPS,
        )
        place = self.folder / f"try{number}"
        return Order(row=row, run=run, warm_up=1, steps=STEPS - 1, folder=place)
