"""Settings that a resumed run must share with the run that saved, and the sentence if it does not.

Learning rates, the number of steps, logging, the number of processes and how the model is cut
between them may change between the two. A run that takes over weights alone must share only what
these weights mean something with.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.step import TrainEngine

ENGINES = ("llm", "vision")
_NOT_SHAPES = ("preset", "init_std")
"""Keys of the model's settings that a trained model no longer depends on."""
_ABSENT = "absent"
_BOUNDS = ("model.llm.max_positions", "model.vision.image_size")
"""Fields of a module that its weights do not depend on, or that their shapes show."""
_DEFAULTS: dict[str, JsonValue] = {"model.llm.vocab_padding": 0}
"""Fields that checkpoints of earlier versions lack, and what they mean by that."""
PLACES = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "world_size",
)
"""Fields that say which part of the model a rank has. A run with other values resumes as well:
elements are found by name and number, and batches do not depend on these."""
_ELASTIC = (*PLACES, *(f"zero_stage.{name}" for name in ENGINES))


def engine_name(engine: TrainEngine, zero: object) -> str:
    """Which of `ENGINES` a ZeRO engine is."""
    return "llm" if zero is engine.parts.llm_engine else "vision"


def layout_of(engine: TrainEngine) -> dict[str, JsonValue]:
    """Values by field name, as JSON gives them back: the model, how it is cut, then the data."""
    run, degrees = engine.run, engine.groups.degrees
    stages = {engine_name(engine, zero): zero.stage for zero in engine.engines}
    fields = dict(_flatten("model", run.model.model_dump(mode="json")))
    fields |= {
        "train.precision": run.train.precision,
        "train.freeze": sorted(run.train.freeze),
        "parallel.tensor": degrees.tensor,
        "parallel.pipeline": degrees.pipeline,
        "parallel.virtual_pipeline": degrees.virtual_pipeline,
        "parallel.context": degrees.context,
        **{f"parallel.{name}": size for name, size in _uneven_stages(run) if size is not None},
        "world_size": degrees.world_size,
        **{f"zero_stage.{name}": stages.get(name) for name in ENGINES},
        "batch.global_size": run.batch.global_size,
        "data.seq_length": run.data.seq_length,
        "data.packing": run.data.packing,
        "data.augment": run.data.augment,
        "train.seed": run.train.seed,
    }
    return json.loads(json.dumps(fields))


def _uneven_stages(run: RunConfig) -> Iterator[tuple[str, int | None]]:
    for name in ("first_stage_layers", "last_stage_layers"):
        yield name, getattr(run.parallel, name)


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, JsonValue]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        if key not in _NOT_SHAPES:
            yield from _flatten(f"{prefix}.{key}", inner)


def layout_problem(
    path: Path, *, saved: Mapping[str, JsonValue], here: Mapping[str, JsonValue]
) -> str | None:
    """One sentence about what differs between a checkpoint and this run; None if it fits.

    Args:
        path: The checkpoint, for the sentence.
        saved: Its fields.
        here: This run's.
    """
    different = [field for field in _different(saved, here) if field not in _ELASTIC]
    if not different:
        return None
    field = different[0]
    there, mine = _value(saved, field), _value(here, field)
    others = f" (also different: {', '.join(different[1:])})" if different[1:] else ""
    return (
        f"{path} does not fit this run: {field} is {_text(there)} in the checkpoint and "
        f"{_text(mine)} here{others}. "
        f"{_fix(field, there)}, or checkpoint.resume=none to start anew."
    )


def same_places(saved: Mapping[str, JsonValue], here: Mapping[str, JsonValue]) -> bool:
    """Whether each rank has the part of the model that the rank of its number had."""
    return not set(_different(saved, here)) & set(PLACES)


def layout_change(saved: Mapping[str, JsonValue], here: Mapping[str, JsonValue]) -> str:
    """What differs in the cut, as `world_size 2 -> 4, parallel.tensor 1 -> 2`; empty if nothing."""
    return ", ".join(
        f"{field} {_text(_value(saved, field))} -> {_text(_value(here, field))}"
        for field in _different(saved, here)
        if field in _ELASTIC
    )


def model_differences(
    *, saved: Mapping[str, JsonValue], here: Mapping[str, JsonValue], modules: Collection[str]
) -> list[str]:
    """One sentence for each field that gives the weights of `modules` another meaning here.

    Args:
        saved: Fields of the checkpoint.
        here: This run's.
        modules: Parts of the model whose weights are taken over; both sides have them.
    """
    sentences = []
    for field in _different(saved, here):
        if not any(_belongs(field, module) for module in modules):
            continue
        there, mine = _value(saved, field), _value(here, field)
        fix = f"Set {field}={_text(there)}"
        if there == _ABSENT:
            fix = "Take a checkpoint that names it"
        sentences.append(
            f"{field} is {_text(there)} in the checkpoint and {_text(mine)} here. "
            f"{fix}, or leave out checkpoint.weights."
        )
    return sentences


def _belongs(field: str, module: str) -> bool:
    """Whether the weights of a module mean something else where the field differs."""
    if module == "resampler":
        names = ("kind", "num_layers", "num_heads")
        return field in [f"model.connector.{name}" for name in names]
    if module == "projector":
        # It reads what the resampler made, by average or by attention.
        return field == "model.connector.kind"
    return field.startswith(f"model.{module}.") and field not in _BOUNDS


def _different(saved: Mapping[str, JsonValue], here: Mapping[str, JsonValue]) -> list[str]:
    return [
        field
        for field in dict.fromkeys([*here, *saved])
        if _value(here, field) != _value(saved, field)
    ]


def _value(fields: Mapping[str, JsonValue], field: str) -> JsonValue:
    return fields.get(field, _DEFAULTS.get(field, _ABSENT))


def _text(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _fix(field: str, there: JsonValue) -> str:
    if there == _ABSENT:
        return f"Remove {field}"
    return f"Set {field}={_text(there)}"
