"""All hostile files at their doors, and what else must be true when they are done."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.cli.hostile.case import Case, Kit, put
from ghostvis_mega.cli.hostile.doors import Doors
from ghostvis_mega.cli.hostile.media_files import MEDIA_CASES, png
from ghostvis_mega.cli.hostile.model_files import MODEL_CASES
from ghostvis_mega.cli.hostile.text_files import TEXT_CASES
from ghostvis_mega.cli.hostile.trial import Limits, Outcome, run_trial
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.template import Turn
from ghostvis_mega.data.tokenizer import train_tokenizer

CASES = [*TEXT_CASES, *MEDIA_CASES, *MODEL_CASES]


@dataclass(frozen=True)
class Result:
    """Of one case."""

    case: Case
    outcome: Outcome
    problem: str | None


def make_kit(folder: Path) -> Kit:
    """The sound files that hostile ones are made of."""
    import zlib

    secret = put(folder / "secret.txt", "nobody should read this")
    picture = png(64, 64, zlib.compress(bytes(9 * 64)))
    put(folder / "kit" / "images" / "good.png", picture)
    texts = ("What is it?", "It is a square.", "system user assistant tool")
    tokenizer = train_tokenizer(texts, vocab_size=300, path=folder / "kit" / "tokenizer.model")
    turns = Turn("user", (texts[0],)), Turn("assistant", (texts[1],))
    dataset = folder / "kit" / "sound.gvd"
    ingest([Source("rows", iter([Row("1", turns)]))], tokenizer=tokenizer, path=dataset)
    return Kit(folder / "canary", secret, tokenizer.path, dataset, picture)


def _files(folder: Path, *, but: Path) -> set[str]:
    """Everything below a folder, without what lies in `but`."""
    found = set()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(place, name) != but]
        found |= {os.path.join(place, name) for name in (*folders, *names)}
    return found


def run_case(case: Case, kit: Kit, folder: Path, *, doors: object, limits: Limits) -> Result:
    """Make the file, bring it to its door, and look at what is there afterwards.

    Args:
        case: The file.
        kit: What it is made of.
        folder: Empty or new; of this case alone.
        doors: Has a method of the name of `case.door`.
        limits: Time and memory.
    """
    path = case.make(kit, folder)
    # One level up as well: `..` leads there.
    out, around = folder.parent / "out", folder.parent
    before = _files(around, but=out)
    outcome = run_trial(getattr(doors, case.door), path, writable=out, limits=limits)
    problem = outcome.problem(limits)
    if kit.canary.exists():
        kit.canary.unlink()
        problem = "a command inside of the file was run"
    elif new := _files(around, but=out) - before:
        problem = f"it left {sorted(new)[0]}"
    return Result(case, outcome, problem)


def run_drill(
    folder: Path, *, limits: Limits | None = None, cases: Iterable[Case] = CASES
) -> Iterator[Result]:
    """Results of all cases, one after the other."""
    kit = make_kit(folder)
    (folder / "cases" / "out").mkdir(parents=True)
    doors = Doors(kit.tokenizer, kit.tokenizer.parent / "images", folder / "cases" / "out")
    for number, case in enumerate(cases):
        own = folder / "cases" / f"{number:03d}"
        own.mkdir()
        yield run_case(case, kit, own, doors=doors, limits=limits or Limits())
