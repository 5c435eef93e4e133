"""Rows of the training benchmark: what is timed, and what is compared with what."""

import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.utils.errors import ConfigError

OURS = "ours"
KINDS = (OURS, "megatron", "megatron+fused-wgrad", "hf", "hf+liger", "naive")
"""This project; Megatron-Core's GPTModel with its distributed optimizer; transformers' Qwen2 under
DeepSpeed; and plain eager PyTorch."""
ALTERNATIVES = " | "
"""Between names of which the fastest counts."""
_MAY_NOT_FIT = "may-not-fit"
_RATIO = re.compile(r"(?P<row>.+?) / (?P<over>.+?)(?:\s*>=\s*(?P<least>[0-9.]+))?")


@dataclass(frozen=True)
class Row:
    """One thing to time, in a launch of its own."""

    name: str
    kind: str = OURS
    settings: tuple[str, ...] = ()
    """`section.key=value` on top of those that all rows share."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of its processes."""
    may_not_fit: bool = False
    """It is tried: to run out of memory is an answer, not a failure of the benchmark."""


@dataclass(frozen=True)
class Ratio:
    """Speed of a row over that of another: achieved TFLOP/s of a device, so that a model with
    pictures may be compared with one without.

    Either may be several names, as in `a | b`: the fastest of them that ran.
    """

    row: str
    over: str
    least: float | None = None
    """The promised figure."""
    label: str = ""
    """Instead of the names, where they are many."""

    @property
    def rows(self) -> list[str]:
        """The names on the left."""
        return self.row.split(ALTERNATIVES)

    @property
    def overs(self) -> list[str]:
        """The names on the right."""
        return self.over.split(ALTERNATIVES)

    @property
    def name(self) -> str:
        """What figures call it."""
        return self.label or f"{self.row} / {self.over}"


@dataclass(frozen=True)
class Bar:
    """A promise about one figure of one row, or of the fastest of several (`a | b`)."""

    row: str
    figure: str
    least: float | None = None
    most: float | None = None


def parse_row(text: str) -> Row:
    """Read "NAME: peer=KIND env.VARIABLE=value may-not-fit section.key=value ..."; without `peer`
    it is ours.

    Raises:
        ConfigError: It has no name, or the kind is unknown, or a variable has no value.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not name:
        raise ConfigError([f'--row {text!r} has no name. Write "NAME: section.key=value ...".'])
    if ALTERNATIVES in name:
        raise ConfigError([f"--row {name!r} holds {ALTERNATIVES!r}, which joins names. Drop it."])
    words = rest.split()
    kinds = [word.removeprefix("peer=") for word in words if word.startswith("peer=")]
    if len(kinds) > 1:
        raise ConfigError([f"--row {text!r} names {len(kinds)} peers. Name one a row."])
    kind = kinds[0] if kinds else OURS
    if kind not in KINDS:
        raise ConfigError([f"--row {text!r}: peer={kind} is unknown. Use {', '.join(KINDS)}."])
    settings = tuple(
        word for word in words if not word.startswith(("peer=", "env.")) and word != _MAY_NOT_FIT
    )
    variables = [word.removeprefix("env.").partition("=") for word in words if word[:4] == "env."]
    wrong = [variable for variable, equals, _ in variables if not (equals and variable)]
    if wrong:
        raise ConfigError([f"--row {text!r}: env.{wrong[0]} has no value. Write env.NAME=value."])
    environment = tuple((variable, value) for variable, _, value in variables)
    return Row(name, kind, settings, environment, may_not_fit=_MAY_NOT_FIT in words)


def parse_ratio(text: str) -> Ratio:
    """Read "ROW / ROW" or "ROW / ROW >= 1.1"; either ROW may be "ROW | ROW".

    Raises:
        ConfigError: It reads otherwise.
    """
    match = _RATIO.fullmatch(text.strip())
    try:
        least = float(match["least"]) if match and match["least"] else None
    except ValueError:
        match = None
    if match is None:
        raise ConfigError([f'--ratio {text!r} is not "ROW / ROW" or "ROW / ROW >= 1.1".'])
    return Ratio(match["row"].strip(), match["over"].strip(), least)


def choose_rows(rows: Iterable[Row], ratios: Iterable[Ratio], only: Iterable[str]) -> list[Row]:
    """The rows to run.

    Raises:
        ConfigError: Names that are double or unknown.
    """
    rows, only = list(rows), list(only)
    names = [row.name for row in rows]
    known = ", ".join(dict.fromkeys(names))
    problems = [
        f"two rows are called {name!r}. Give each a name of its own."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    problems += [f"--only {n!r} is no row. Use {known}." for n in only if n not in names]
    for ratio in ratios:
        problems += [
            f"the ratio {ratio.name} names {name!r}, which is no row. Use {known}."
            for name in (*ratio.rows, *ratio.overs)
            if name not in names
        ]
    if not rows:
        problems.append('there is nothing to time: add --row "NAME: settings", or --preset.')
    if problems:
        raise ConfigError(problems)
    return [row for row in rows if not only or row.name in only]


def peer_problems(row: Row, run: RunConfig) -> Iterator[str]:
    """What a peer cannot do, as sentences."""
    if row.kind == OURS:
        return
    start, parallel, llm = f"row {row.name!r}: peer={row.kind}", run.parallel, run.model.llm
    if run.data.packing:
        yield (
            f"{start} computes rows of one sample each, but data.packing=true. Set "
            "data.packing=false and batch.micro_size."
        )
    if llm.activation != "swiglu" or not llm.qkv_bias or llm.vocab_padding or llm.hidden_dropout:
        yield f"{start} knows Qwen2.5's layers only. Use a preset qwen25_... or vlm_... as it is."
    if run.tower.window:
        yield f"{start} has no windows, but tower.window={run.tower.window}. Set it to 0."
    degrees = {"pipeline": parallel.pipeline, "context": parallel.context}
    if not row.kind.startswith("megatron"):
        degrees["tensor"] = parallel.tensor
        if llm.hidden_size != llm.num_heads * llm.head_dim:
            yield (
                f"{start} has heads of hidden_size / num_heads, but model.llm.head_dim="
                f"{llm.head_dim}. Use {llm.hidden_size // llm.num_heads}."
            )
        if run.train.fp8 != "none":
            yield f"{start} has no FP8, but train.fp8={run.train.fp8}. Set train.fp8=none."
    for name, degree in degrees.items():
        if degree > 1:
            yield f"{start} is not cut that way: parallel.{name}={degree}. Set it to 1."
    if row.kind.startswith("megatron"):
        if run.model.vision is not None:
            yield f"{start} is a text model. Use model.preset=qwen25_... and text."
        if "llm" in run.train.freeze:
            yield f"{start} trains the LLM, but train.freeze holds llm. Remove it."
    if row.kind == "naive" and run.train.recompute != "none":
        yield f"{start} has no activation checkpointing. Set train.recompute=none."
    elif run.train.recompute == "auto":
        yield f"{start} does not choose by memory: train.recompute=auto. Set none or full."
    if row.kind.startswith("hf") and run.train.recompute == "selective":
        yield f"{start} checkpoints whole layers. Set train.recompute to none or full."
    if row.kind == "hf+liger" and importlib.util.find_spec("liger_kernel") is None:
        yield f"{start} needs liger-kernel, which is not installed: pip install liger-kernel."
