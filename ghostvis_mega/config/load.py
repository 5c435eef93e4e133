"""Load a run's settings: YAML file, overrides, presets, types, all problems at once.

Relative paths in the file (data, ds_configs, output) are taken from the working directory, as on
a command line, not from the file's own directory.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ghostvis_mega.config.messages import dotted, section_at, section_of, sentences
from ghostvis_mega.config.presets import MODEL_PRESETS
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.config.source import apply_overrides, expand_presets, read_file
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.secrets import find_secrets, hide

Settings = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """What could be read. With problems, `config` holds stand-ins at the `broken` fields."""

    config: RunConfig | None
    problems: list[str]
    broken: frozenset[str] = frozenset()

    def keep_sound(self, found: list[str]) -> list[str]:
        """Those sentences that do not speak of a field which only has a stand-in."""
        names = [re.compile(rf"(?<![\w.]){re.escape(name)}(?!\w)") for name in self.broken]
        return [text for text in found if not any(name.search(text) for name in names)]


def read_run_config(path: str | Path, overrides: Iterable[str] = ()) -> Loaded:
    """Read a run's settings and collect every problem instead of raising."""
    settings, problems = read_file(Path(path))
    if problems and not settings:
        return Loaded(None, problems)
    problems += apply_overrides(settings, list(overrides))
    problems += _secret_problems(settings)
    settings, more = expand_presets(_without_empty_sections(settings))
    problems += more
    try:
        return Loaded(RunConfig.model_validate(settings), problems)
    except ValidationError as error:
        found = sentences(error)
        # An unknown preset already says why the parts of the model are missing.
        for preset, parts in (
            ("model.preset=", "model."),
            ("model.vision.preset=", "model.vision."),
        ):
            if any(text.startswith(preset) for text in problems):
                found = [text for text in found if f"{parts}" not in text or "missing" not in text]
        config, broken = _with_stand_ins(settings, error)
        return Loaded(config, problems + found, broken)


def load_run_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's settings.

    Args:
        path: YAML file.
        overrides: Items `section.key=value`; the value is YAML (`null`, `[a, b]`, `1e-4`).

    Raises:
        ConfigError: With all unknown keys, wrong types and values out of range. Rules between
            fields need the world size: see `rules.find_problems` and `train.preflight`.
    """
    loaded = read_run_config(path, overrides)
    if loaded.problems or loaded.config is None:
        raise ConfigError(loaded.problems)
    return loaded.config


def _secret_problems(settings: Settings, place: str = "") -> list[str]:
    """Settings that hold a secret of the environment: logs, reports and checkpoints show them."""
    problems = []
    secrets = find_secrets()
    for key, value in settings.items():
        name = f"{place}{key}"
        if isinstance(value, dict):
            problems += _secret_problems(value, f"{name}.")
            continue
        shown = f"{key} {value}"
        problems += [
            f"{hide(name)} holds the value of ${secret.name}, which is a secret. Remove it: "
            "settings are written to logs and checkpoints; secrets are read from the environment."
            for secret in secrets
            if secret.value in shown
        ]
    return problems


def _without_empty_sections(settings: Settings) -> Settings:
    """Drop sections whose keys are all commented out (YAML reads them as null)."""
    fields = RunConfig.model_fields
    return {k: v for k, v in settings.items() if not (v is None and k in fields)}


def _with_stand_ins(
    settings: Settings, error: ValidationError
) -> tuple[RunConfig | None, frozenset[str]]:
    """Settings without their broken keys, so that the rules can still speak of the sound ones."""
    broken = set()
    for item in error.errors(include_url=False):
        place = item["loc"]
        cut = next((i for i, part in enumerate(place) if isinstance(part, int)), len(place))
        place = place[:cut]
        parent: Any = settings
        for part in place[:-1]:
            parent = parent.get(part) if isinstance(parent, dict) else None
        kind = section_at(place[:-1])
        if kind is None or not isinstance(parent, dict):
            continue
        parent.pop(place[-1], None)
        broken.add(dotted(place))
        field = kind.model_fields.get(str(place[-1]))
        if field is not None and field.is_required():
            parent[place[-1]] = _stand_in(field.annotation)
    whole_model = ({**settings, "model": MODEL_PRESETS["vlm_tiny"]}, broken | {"model"})
    # A model without its LLM has no sizes that anything could be said of.
    no_llm = not broken.isdisjoint({"model", "model.llm"})
    for candidate, names in [whole_model] if no_llm else [(settings, broken), whole_model]:
        try:
            return RunConfig.model_validate(candidate), frozenset(names)
        except ValidationError:
            continue
    return None, frozenset()


def _stand_in(annotation: Any) -> Any:
    """Some value of the right type."""
    section = section_of(annotation)
    if section is not None:
        fields = section.model_fields.items()
        return {name: _stand_in(f.annotation) for name, f in fields if f.is_required()}
    return "unset" if annotation in (str, Path) else 1
