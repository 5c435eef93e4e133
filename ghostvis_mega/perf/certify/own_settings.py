"""Settings of somebody's own run, as a certificate changes them. Needs no torch."""

from dataclasses import replace
from math import lcm

from ghostvis_mega.config.load import read_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.perf.certify.request import Entry, Request
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import ConfigError


def load_own(request: Request, entry: Entry) -> RunConfig:
    """Settings of one layout of a run, with what a certificate changes.

    No warm-up: with it the first steps would move nothing. No reading ahead: layouts come and go.
    Random weights, whatever the run begins with.
    Samples are aligned as the layout with the largest context degree needs, so that all read the
    same packs.

    Raises:
        ConfigError: With all problems.
    """
    assert request.config is not None
    changed = [
        "optim.warmup_steps=0",
        "data.num_workers=0",
        "checkpoint.weights=null",
        "checkpoint.weights_of=[]",
        "checkpoint.resume=none",
        f"log.output={request.folder / 'run'}",
    ]
    given = [*request.overrides, *entry.overrides, *changed]
    run = load_checked(request.config, given, world_size=entry.ranks)
    if request.align > 1 and run.data.packing:
        given.append(f"data.segment_align={request.align}")
        run = load_checked(request.config, given, world_size=entry.ranks)
    return run


def not_read(request: Request) -> list[str]:
    """Sentences about settings of a run that say what it begins with; `load_own` drops them."""
    assert request.config is not None
    given = read_run_config(request.config, request.overrides).config
    if given is None:
        return []  # `checked` says why
    begin = {
        "checkpoint.weights": given.checkpoint.weights,
        "checkpoint.resume": given.checkpoint.resume if given.checkpoint.resume != "none" else None,
    }
    return [
        f"{name}={value} is not read: layouts and reference begin with the random weights of "
        "train.seed."
        for name, value in begin.items()
        if value not in (None, "auto")
    ]


def checked(request: Request) -> Request:
    """The request with the alignment that suits all its layouts.

    Raises:
        ConfigError: What is wrong with the settings of any layout, each sentence once.
    """
    problems: dict[str, str] = {}
    runs = []
    for entry in request.entries:
        try:
            runs.append(load_own(request, entry))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, entry.name)
    if problems:
        several = len(request.entries) > 1
        raise ConfigError(
            [f"layout {name!r}: {text}" if several else text for text, name in problems.items()]
        )
    return replace(request, align=lcm(*(run.segment_align for run in runs)))
