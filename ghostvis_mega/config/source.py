"""From a YAML file, overrides and presets to one plain dictionary, and the problems met."""

import copy
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ghostvis_mega.config.presets import MODEL_PRESETS, TOWER_PRESETS
from ghostvis_mega.utils.files import read_small

Settings = dict[str, Any]

MOST_VALUES = 100_000
"""Far above any real file; a few lines of nested aliases can unfold to billions."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reports repeated keys and reads 1e-4 as a number."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.repeated: list[tuple[int, str]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            if key_node.value in seen:
                self.repeated.append((key_node.start_mark.line + 1, key_node.value))
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 wants a dot in a float, so plain SafeLoader reads 1e-4 as a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> tuple[Any, list[tuple[int, str]]]:
    """Parse one YAML document safely.

    Returns:
        The value, and (line, key) of every key that appears twice in one mapping.

    Raises:
        yaml.YAMLError: The text is not YAML.
    """
    loader = _Loader(text)
    try:
        return _plain(loader.get_single_data(), iter(range(MOST_VALUES))), loader.repeated
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _plain(value: Any, budget: Iterator[int], above: tuple[int, ...] = ()) -> Any:
    """A copy with every key as text (YAML reads `on:` as true, `1:` as 1) and without aliases.

    Raises:
        yaml.YAMLError: The aliases are circular, or unfold to more than the budget.
    """
    if id(value) in above:
        raise yaml.YAMLError("an alias contains itself")
    if next(budget, None) is None:
        raise yaml.YAMLError(f"it unfolds to more than {MOST_VALUES} values")
    if isinstance(value, dict):
        inner = (*above, id(value))
        return {str(key): _plain(item, budget, inner) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, budget, (*above, id(value))) for item in value]
    return value


def _describe(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return where + str(getattr(error, "problem", None) or error).replace("\n", " ")


def read_file(path: Path) -> tuple[Settings, list[str]]:
    """Read a settings file. Returns the mapping (empty if it has none) and the problems."""
    if path.is_dir():
        return {}, [f"{path} is a directory. Name the YAML file in it."]
    if not path.exists():
        near: list[str] = []
        if path.parent.is_dir():
            names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
            near = difflib.get_close_matches(path.name, names, n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        return {}, [f"{path} does not exist (working directory: {Path.cwd()}).{hint}"]
    try:
        text = read_small(path).decode("utf-8")
    except UnicodeDecodeError:
        return {}, [f"{path} is not UTF-8 text. Save it as UTF-8 YAML."]
    except OSError as error:
        return {}, [f"{path} cannot be read: {error.strerror}. Check the file and its permissions."]
    try:
        value, repeated = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        what = _describe(error) if isinstance(error, yaml.YAMLError) else str(error)
        return {}, [f"{path} is not valid YAML: {what}. Check the indentation and quotes there."]
    problems = [
        f"{path} line {line}: the key {key} appears twice in one section. Keep one of the two."
        for line, key in repeated
    ]
    if value is None:
        return {}, [f"{path} is empty. Start from one of the files in examples/configs/."]
    if not isinstance(value, dict):
        kind = type(value).__name__
        return {}, [f"{path} holds a {kind}, not sections (model:, data:, batch:, ...)."]
    return value, problems


def apply_overrides(settings: Settings, overrides: list[str]) -> list[str]:
    """Write `section.key=value` items into `settings`, in order. Returns the problems."""
    problems = []
    for item in overrides:
        name, equals, text = item.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"override {item!r} is not of the form section.key=value.")
            continue
        try:
            value, _ = parse_yaml(text)
        except (yaml.YAMLError, ValueError):
            problems.append(f"override {item!r} has a value that is not YAML. Quote it.")
            continue
        place = settings
        for depth, key in enumerate(keys[:-1], 1):
            if place.get(key) is None:
                place[key] = {}
            if not isinstance(place[key], dict):
                parent = ".".join(keys[:depth])
                problems.append(f"override {item!r} reaches into {parent}, which is no section.")
                break
            place = place[key]
        else:
            place[keys[-1]] = value
    return problems


def merge(base: Settings, over: Settings) -> Settings:
    """Deep copy of `base` under the keys of `over`; mappings are merged, the rest replaced."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _find_preset(field: str, name: Any, presets: dict[str, Settings]) -> tuple[Settings, list[str]]:
    if isinstance(name, str) and name in presets:
        return presets[name], []
    near = difflib.get_close_matches(str(name), presets, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return {}, [f"{field}={name} is not a preset.{hint} There are: {', '.join(presets)}."]


def expand_presets(settings: Settings) -> tuple[Settings, list[str]]:
    """Put what `model.preset` and `model.vision.preset` stand for under the given keys."""
    model = settings.get("model")
    if not isinstance(model, dict):
        return settings, []
    problems: list[str] = []
    base: Settings = {}
    if model.get("preset") is not None:
        base, problems = _find_preset("model.preset", model["preset"], MODEL_PRESETS)
    vision = model.get("vision")
    if isinstance(vision, dict) and vision.get("preset") is not None:
        tower, more = _find_preset("model.vision.preset", vision["preset"], TOWER_PRESETS)
        problems += more
        # A tower named beside a model preset replaces the model's tower as a whole.
        own = {key: value for key, value in vision.items() if key != "preset"}
        base = {key: value for key, value in base.items() if key != "vision"}
        model = {**model, "vision": merge(tower, own)}
    return {**settings, "model": merge(base, model)}, problems
