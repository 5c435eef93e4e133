"""Read an ordinary DeepSpeed JSON, fill in its "auto" values and refuse what contradicts the run.

The engine layer accumulates micro-batches in Megatron's schedule, reduces once a step, clips over
both engines and brings its own AdamW. A file that asks DeepSpeed for any of that differently would
train something else than the YAML says, so it is refused and never silently overruled. DeepSpeed
itself is not imported here.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_mega.config.deepspeed_rules import Engine, FileCheck, Settings
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.files import read_small


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """What `deepspeed.initialize(config=...)` gets."""

    stage: int
    config: Settings
    offload: bool = False
    """Whether masters, moments and the update are on the host."""


def resolve_deepspeed(
    path: str | Path, *, run: RunConfig, engine: Engine, world_size: int
) -> ResolvedDeepSpeed:
    """Resolve one file for one engine.

    Args:
        path: DeepSpeed JSON; relative to the working directory.
        run: The run it belongs to.
        engine: Whose engine it configures.
        world_size: Number of processes.

    Raises:
        ConfigError: With every contradiction, unknown key and unsupported feature.
    """
    resolved, problems = try_resolve(path, run=run, engine=engine, world_size=world_size)
    if problems or resolved is None:
        raise ConfigError(problems)
    return resolved


def engine_files(run: RunConfig) -> dict[Engine, Path]:
    """The file of each engine that the run creates. A frozen part has no engine."""
    files: dict[Engine, Path] = {}
    if "llm" in run.trained_modules:
        files["llm"] = run.deepspeed.llm
    if set(run.trained_modules) - {"llm"}:
        files["vision"] = run.deepspeed.vision or run.deepspeed.llm
    return files


def find_problems(run: RunConfig, *, world_size: int) -> list[str]:
    """Problems of both engines' files, one sentence each."""
    found: list[str] = []
    for engine, path in engine_files(run).items():
        found += try_resolve(path, run=run, engine=engine, world_size=world_size)[1]
    if "llm" not in run.trained_modules:
        found += _frozen_llm_problems(run, world_size)
    return list(dict.fromkeys(found))


def _frozen_llm_problems(run: RunConfig, world_size: int) -> list[str]:
    resolved, problems = try_resolve(
        run.deepspeed.llm, run=run, engine="llm", world_size=world_size
    )
    if resolved is not None and resolved.stage == 3:
        return [
            f"{run.deepspeed.llm}: zero_optimization.stage=3 would not shard the LLM: train.freeze "
            "names it, and a frozen LLM has no engine. Use stage 1 or 2, and parallel.tensor to "
            "split its weights."
        ]
    return problems if resolved is None else []


def try_resolve(
    path: str | Path, *, run: RunConfig, engine: Engine, world_size: int
) -> tuple[ResolvedDeepSpeed | None, list[str]]:
    """As `resolve_deepspeed`, but returns the problems; None when the file has no stage."""
    path = Path(path)
    given, problems = _read(path, field=_field(run, engine))
    if problems:
        return None, problems
    check = FileCheck(path=path, given=given, run=run, engine=engine, world_size=world_size)
    config = check.resolve()
    return ResolvedDeepSpeed(check.stage, config, check.offload), check.problems


def _field(run: RunConfig, engine: Engine) -> str:
    own_file = engine == "vision" and run.deepspeed.vision is not None
    return "deepspeed.vision" if own_file else "deepspeed.llm"


def _read(path: Path, *, field: str) -> tuple[Settings, list[str]]:
    if not path.is_file():
        near = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(
                path.name, [p.name for p in path.parent.iterdir()], n=1
            )
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        where = f"working directory: {Path.cwd()}"
        return {}, [f"{field}={path} is not a file ({where}).{hint} ds_configs/ holds ready ones."]
    found: list[str] = []

    def collect(pairs: Iterable[tuple[str, Any]]) -> Settings:
        mapping: Settings = {}
        for key, value in pairs:
            if key in mapping:
                found.append(f"{path}: the key {key} appears twice. Keep one of the two.")
            mapping[key] = value
        return mapping

    def refuse_constant(name: str) -> None:
        found.append(f'{path}: {name} is not a number in JSON. Give one, or "auto".')

    try:
        given = json.loads(
            read_small(path).decode("utf-8"),
            object_pairs_hook=collect,
            parse_constant=refuse_constant,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        return {}, [f"{path} is not valid JSON: {where}: {error.msg}. JSON has no comments."]
    except RecursionError:
        return {}, [f"{path} is nested too deeply. A DeepSpeed file has two or three levels."]
    except UnicodeDecodeError:
        return {}, [f"{path} is not UTF-8 text. Save it as UTF-8 JSON."]
    except ValueError as error:  # a number of thousands of digits
        return {}, [f"{path} is not valid JSON: {error}."]
    except OSError as error:
        return {}, [f"{path} cannot be read: {error.strerror}. Check the file."]
    if not isinstance(given, dict):
        return {}, [f"{path} holds a {type(given).__name__}. A DeepSpeed file is one JSON object."]
    return given, found
