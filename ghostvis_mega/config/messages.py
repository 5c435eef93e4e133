"""Pydantic's findings as sentences that name the field, the value, the rule and the fix."""

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from ghostvis_mega.config.presets import MODEL_PRESETS
from ghostvis_mega.config.schema import RunConfig

Place = tuple[str | int, ...]

_OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "batch.global_size",
    "global_batch_size": "batch.global_size",
    "micro_batch_size": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "max_length": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "grad_clip": "optim.clip_norm",
    "clip_grad": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "gradient_checkpointing": "train.recompute",
    "output_dir": "log.output",
    "save_steps": "checkpoint.save_every",
    "bf16": "train.precision",
}
"""What other trainers call our settings."""


def dotted(place: Place) -> str:
    """`("optim", "betas", 0)` as `optim.betas[0]`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class behind an annotation such as `VisionConfig | None`, if there is one."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def section_at(place: Place) -> type[BaseModel] | None:
    """The settings class at a place of a run's settings."""
    kind: type[BaseModel] | None = RunConfig
    for part in place:
        if kind is None or part not in kind.model_fields:
            return None
        kind = section_of(kind.model_fields[part].annotation)
    return kind


def all_fields(kind: type[BaseModel] = RunConfig, above: str = "") -> list[str]:
    """Dotted names of all settings."""
    names = []
    for name, field in kind.model_fields.items():
        section = section_of(field.annotation)
        names += all_fields(section, f"{above}{name}.") if section else [above + name]
    return names


def unknown_key(place: Place) -> str:
    """Sentence for a key that no section knows, with the key it was probably meant to be."""
    name, key = dotted(place), str(place[-1])
    section = section_at(place[:-1])
    siblings = list(section.model_fields) if section else []
    if key in _OTHER_NAMES:
        return f"{name} is not a setting. Here it is {_OTHER_NAMES[key]}."
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"{name} is not a setting. Did you mean {dotted((*place[:-1], near[0]))}?"
    fields = all_fields()
    last_parts = {field.rpartition(".")[2]: field for field in reversed(fields)}
    sections = list(RunConfig.model_fields)
    if key in sections:
        return f"{name} is not a setting. Did you mean the section {key} at the top level?"
    near = difflib.get_close_matches(key, last_parts, n=1, cutoff=0.75)
    if near:
        return f"{name} is not a setting. Did you mean {last_parts[near[0]]}?"
    known = f" Settings of {dotted(place[:-1]) or 'a run'}: {', '.join(siblings)}."
    return f"{name} is not a setting.{known if siblings else ''} Remove it."


def _missing(place: Place) -> str:
    name = dotted(place)
    if place == ("model", "llm"):
        presets = ", ".join(MODEL_PRESETS)
        return f"model.llm is missing. Name a preset (model.preset: one of {presets}) or give it."
    if isinstance(place[-1], int):
        return f"{dotted(place[:-1])} has too few values. Give one more."
    section = section_at(place)
    if section is not None:
        needed = [key for key, field in section.model_fields.items() if field.is_required()]
        return f"the section {name} is missing. Add it with {', '.join(needed)}."
    return f"{name} is missing. Set it in the file, or on the command line: {name}=VALUE."


def _limit(name: str, value: Any, error: dict[str, Any]) -> str:
    context = error["ctx"]
    rules = {
        "greater_than_equal": ("ge", "at least {}"),
        "greater_than": ("gt", "above {}"),
        "less_than_equal": ("le", "at most {}"),
        "less_than": ("lt", "below {}"),
    }
    key, words = rules[error["type"]]
    limit = context[key]
    limit = int(limit) if float(limit).is_integer() else limit
    return f"{name}={value} is out of range. Use a value {words.format(limit)}."


def _choice(name: str, value: Any, expected: str) -> str:
    choices = [part.strip("' ") for part in expected.replace(" or ", ", ").split(", ")]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name}={value} is not one of the choices.{hint} Use one of: {', '.join(choices)}."


def sentence(error: dict[str, Any]) -> str:
    """One pydantic error (of `ValidationError.errors()`) as one sentence."""
    place, kind, value = tuple(error["loc"]), error["type"], error.get("input")
    name = dotted(place)
    if kind == "extra_forbidden":
        return unknown_key(place)
    if kind == "missing":
        return _missing(place)
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return _limit(name, value, error)
    if kind == "literal_error":
        return _choice(name, value, error["ctx"]["expected"])
    if kind in ("model_type", "model_attributes_type"):
        section = section_at(place)
        keys = ", ".join(section.model_fields) if section else "keys"
        return f"{name}={value!r} is not a section. Write its settings below it: {keys}."
    if kind in ("tuple_type", "list_type"):
        return f"{name}={value} is not a list. Write {name}: [{value}]."
    if kind == "too_long":
        return f"{name}={value} has {error['ctx']['actual_length']} values. " + (
            f"Give {error['ctx']['max_length']}."
        )
    if kind == "finite_number":
        return f"{name}={value} is not a finite number. Give one."
    shapes = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    shapes |= {"string": "a text", "path": "a path"}
    for prefix, words in shapes.items():
        if kind.startswith(prefix):
            given = "is empty" if value is None else f"{value!r} is not {words}"
            joint = " " if value is None else "="
            return f"{name}{joint}{given}. Give {words}."
    return f"{name}={value!r}: {error['msg']}."


def sentences(error: ValidationError) -> list[str]:
    """All findings of one validation."""
    return [sentence(item) for item in error.errors(include_url=False)]
