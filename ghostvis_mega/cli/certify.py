"""`ghostvis certify`: every layout is the same step, shown on one's own machine."""

import json
import logging
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostvis_mega.cli.output import AsJson, refusing_settings
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.logging import setup_logging

if TYPE_CHECKING:
    import torch

    from ghostvis_mega.perf.certify.report import Outcome
    from ghostvis_mega.perf.certify.request import Entry, Request

FOLDER_BYTES = 4096
"""Longest path that Linux takes."""
CERTIFY_HELP = """Compare layouts with one plain process: gradients, loss, weights after some steps.

\b
Examples (--layouts cpu: two cores and some minutes; gpu: two or four GPUs, or one that ranks share,
BF16; the last three certify a run of your own):
  python -m ghostvis_mega certify --layouts cpu --faults
  python -m ghostvis_mega certify --layouts cpu --only "PP2.*perceiver" --processes 4
  python -m ghostvis_mega certify --layouts gpu --faults --json > rows.json
  python -m ghostvis_mega certify --layouts gpu --ranks-per-gpu 4
  python -m ghostvis_mega certify RUN.yaml --processes 2
  python -m ghostvis_mega certify RUN.yaml parallel.tensor=2 batch.global_size=8 --processes 4
  python -m ghostvis_mega certify RUN.yaml --layouts examples/certify/four_processes.yaml

\b
The command starts its own processes; under torchrun it joins those it finds, on one machine.
In fp32 every figure has a fixed bar. In BF16 the bars are twice the gradient's error of one
process that computes in BF16 as well, and three times its other errors. Layouts that need more
processes than there are are listed as not run. For layouts across machines, or a model whose fp32
AdamW states fit on no single device, there is `gradients`: one step, and a truth kept in a file.
Exit code: 0 fine, 1 something is over its bar or failed, 2 wrong settings.
"""


def certify(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a run of your own.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(help="cpu, gpu, or with RUN.yaml a YAML file of layouts.", show_default=False),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only names in which this is found.")
    ] = None,
    faults: Annotated[bool, typer.Option(help="Plant faults as well: each must be seen.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each layout.")] = 3,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Most processes to start.", show_default=False)
    ] = None,
    ranks_per_gpu: Annotated[
        int, typer.Option(min=1, help="Ranks that share a GPU, where GPUs are few; slow.")
    ] = 1,
    as_json: AsJson = False,
    output: Annotated[
        Path | None, typer.Option(help="Keep rows.json and table.md in this folder.")
    ] = None,
    request: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Certify layouts."""
    from ghostvis_mega.perf.certify.request import Request

    if request is not None:
        _run_started(Request.read(request))
        return
    setup_logging(rank=int(os.environ.get("RANK", "0")))
    with tempfile.TemporaryDirectory(prefix="ghostvis-certify-") as folder:
        with refusing_settings():
            _refuse_mixed(config, layouts, faults=faults)
            most = _processes(layouts, processes, share=ranks_per_gpu)
            wanted = _wanted(config, overrides, layouts, only, faults, steps, most)
            wanted = replace(wanted, folder=Path(folder), ranks_per_gpu=ranks_per_gpu)
            todo = _fitting(wanted, most)
            _make_output(output)
        done = _join(todo) if "WORLD_SIZE" in os.environ else _start(todo)
    if int(os.environ.get("RANK", "0")) == 0:
        _report([done.get(entry) or _not_run(entry) for entry in wanted.entries], as_json, output)


def _refuse_mixed(config: Path | None, layouts: str | None, *, faults: bool) -> None:
    """What cannot be asked for together."""
    from ghostvis_mega.perf.certify.request import SETS

    if config is not None and layouts in SETS:
        raise ConfigError([f"--layouts {layouts} has a model of its own: leave out {config}."])
    if config is None and layouts not in SETS:
        raise ConfigError([f"--layouts {layouts} needs RUN.yaml. Or use --layouts cpu or gpu."])
    if faults and layouts not in SETS:
        raise ConfigError(["--faults are planted in layouts of --layouts cpu or gpu. Use one."])


def _wanted(
    config: Path | None,
    overrides: list[str] | None,
    layouts: str | None,
    only: str | None,
    faults: bool,
    steps: int,
    most: int,
) -> "Request":
    """All that was asked for, on up to `most` processes."""
    from ghostvis_mega.perf.certify.request import Entry, Request, chosen, entries_of, own_entries

    if config is None:
        entries = entries_of(str(layouts), faults=faults)
    elif layouts is None:
        entries = [Entry("the run as it is", most)]
    else:
        entries = own_entries(Path(layouts), ranks=most)
    return Request(
        set=str(layouts) if config is None else "own",
        entries=tuple(chosen(entries, only)),
        steps=steps,
        folder=Path(),
        config=config,
        overrides=tuple(overrides or ()),
    )


def _processes(layouts: str | None, processes: int | None, *, share: int) -> int:
    """Processes that can be started, `share` on a GPU, or that a launcher has started."""
    from ghostvis_mega.utils.hardware import has_cuda_device

    if share > 1 and (layouts == "cpu" or not has_cuda_device()):
        raise ConfigError([f"--ranks-per-gpu {share}: no GPU to share. Leave it out."])
    if "WORLD_SIZE" in os.environ:
        return _joined_processes(layouts)
    if layouts == "cpu":
        return processes or 8
    gpus = 0
    if has_cuda_device():
        import torch

        gpus = torch.cuda.device_count()
    room = gpus * share
    if layouts == "gpu" and room < 2:
        way = "Let ranks share it: --ranks-per-gpu 4" if gpus else "Use cpu"
        raise ConfigError([f"--layouts gpu needs 2 GPUs, and {gpus} are visible. {way}."])
    if gpus and processes is not None and processes > room:
        raise ConfigError(
            [f"--processes {processes} are more than {share} on each of the {gpus} visible GPUs. "
             "Start fewer, or let more ranks share a GPU: --ranks-per-gpu."]
        )  # fmt: skip
    return processes or room or 4


def _joined_processes(layouts: str | None) -> int:
    """Processes that a launcher has started."""
    from ghostvis_mega.utils.hardware import has_cuda_device

    size, here = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE")
    if here is not None and here != size:
        raise ConfigError(
            [f"WORLD_SIZE={size} and LOCAL_WORLD_SIZE={here}: the launcher spans several machines. "
             "A certificate shares files among its processes: start all of them on one machine."]
        )  # fmt: skip
    if layouts == "cpu" and has_cuda_device():
        raise ConfigError(
            ["--layouts cpu under a launcher would run on the GPUs of this machine. Hide them: "
             "CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu."]
        )  # fmt: skip
    return int(size)


def _make_output(output: Path | None) -> None:
    """Find out before the work whether its result can be kept."""
    if output is None or os.environ.get("RANK", "0") != "0":
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(
            [f"--output {output} cannot be written: {error.strerror}. Name a folder of yours."]
        ) from None


def _fitting(wanted: "Request", most: int) -> "Request":
    """What runs on the processes there are, its settings checked."""
    joined = "WORLD_SIZE" in os.environ
    fitting = tuple(
        entry
        for entry in wanted.entries
        if (entry.ranks == most if joined else entry.ranks <= most)
    )
    if not fitting:
        needs = sorted({entry.ranks for entry in wanted.entries})
        raise ConfigError(
            [f"No layout runs on {most} processes: they need {', '.join(map(str, needs))}. "
             "Start as many, or leave that to this command."]
        )  # fmt: skip
    todo = replace(wanted, entries=fitting)
    if todo.config is not None:
        from ghostvis_mega.perf.certify.own_settings import checked, not_read

        done = checked(todo)
        for sentence in not_read(todo) if os.environ.get("RANK", "0") == "0" else []:
            typer.echo(f"certify: {sentence}", err=True)
        return done
    return todo


def _not_run(entry: "Entry") -> "Outcome":
    from ghostvis_mega.perf.certify.report import Outcome

    why = f"needs {entry.ranks} processes"
    return Outcome(entry.name, not_run=why, fault=entry.fault)


def _start(todo: "Request") -> "dict[Entry, Outcome]":
    """Start ranks for all entries."""
    from ghostvis_mega.perf.certify.drive import certify as drive
    from ghostvis_mega.utils.hardware import has_cuda_device

    on_gpu = todo.set != "cpu" and has_cuda_device()
    if todo.config is not None and on_gpu:
        from ghostvis_mega.perf.certify.own_settings import load_own

        on_gpu = load_own(todo, todo.entries[0]).train.device != "cpu"
    return drive(
        todo,
        device="cuda" if on_gpu else "cpu",
        progress=lambda text: typer.echo(f"certify: {text}", err=True),
    )


def _run_started(request: "Request") -> None:
    """One rank of a launch that `drive` started."""
    # Libraries print; standard output belongs to the table.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from ghostvis_mega.perf.certify.drive import note_error

    try:
        _run_ranks(request)
    except BaseException as error:
        # The launch ends all ranks; what it ends with says which layout, and this says why.
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        note_error(request.folder, rank=int(os.environ["RANK"]), text=text)
        raise


def _join(request: "Request") -> "dict[Entry, Outcome]":
    """Be one rank of a launch that somebody else started."""
    from ghostvis_mega.perf.certify.report import Outcome

    rows = _run_ranks(request, joined=True)
    return {
        entry: Outcome(entry.name, row=row, fault=entry.fault)
        for entry, row in zip(request.entries, rows, strict=True)
    }


def _run_ranks(request: "Request", *, joined: bool = False) -> list[dict[str, Any]]:
    """In a rank: measure everything; ranks that `joined` have a folder each, and share rank 0's."""
    rank = int(os.environ["RANK"])
    setup_logging(rank=rank)
    # One line a layout is progress enough.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("ghostvis_mega").setLevel(logging.WARNING)
    from ghostvis_mega.perf.certify.ranks import measure_all, opening_run
    from ghostvis_mega.session import local_device, open_world

    run = opening_run(request)
    with open_world(run, device=local_device(run)) as world:
        if joined:
            folder = _folder_of_first(request.folder, device=world.device)
            request = replace(request, folder=folder)

        def progress(text: str) -> None:
            world.watchdog.alive(text)
            if rank == 0:
                typer.echo(f"certify: {text}", err=True)

        return measure_all(
            request,
            world.groups,
            device=world.device,
            progress=progress,
            alive=world.watchdog.alive,
        )


def _folder_of_first(own: Path, *, device: "torch.device") -> Path:
    """Rank 0's folder, which it alone made and will remove; collective."""
    import torch
    import torch.distributed as dist

    name = os.fsencode(own).ljust(FOLDER_BYTES, b"\0")
    sent = torch.tensor(list(name), dtype=torch.uint8, device=device)
    dist.broadcast(sent, src=0)
    return Path(os.fsdecode(bytes(sent.tolist()).rstrip(b"\0")))


def _report(outcomes: "list[Outcome]", as_json: bool, output: Path | None) -> None:
    from ghostvis_mega.cli.output import print_rows
    from ghostvis_mega.perf.certify.report import exit_code, markdown, show

    rows = [figure for outcome in outcomes for figure in outcome.figures()]
    if as_json:
        print_rows(rows, title="", as_json=True)
    else:
        show(outcomes, title="layouts against one plain process")
    if output is not None:
        (output / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
        command = shlex.join(["python", "-m", "ghostvis_mega", *sys.argv[1:]])
        (output / "table.md").write_text(markdown(outcomes, command=command))
    code = exit_code(outcomes)
    if code:
        raise typer.Exit(code)
