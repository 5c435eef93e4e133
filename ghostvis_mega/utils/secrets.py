"""Secrets: they come from the environment alone, and their values are in no output of ours.

Which variables are secret is told by their names; what is hidden are their values, wherever they
turn up. A setting that holds one is refused (`config.load`), so that reports, checkpoints and
trackers, which show the settings, cannot.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

HIDDEN = "***"
_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|JWT|PAT|(API|ACCESS|PRIVATE)_?KEY)(_|$)",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Characters; hiding a shorter value would hide ordinary words."""


@dataclass(frozen=True)
class Secret:
    """A variable of the environment whose value is not to be seen."""

    name: str
    value: str = field(repr=False)

    def __str__(self) -> str:
        return HIDDEN


def find_secrets(environment: Mapping[str, str] | None = None) -> tuple[Secret, ...]:
    """Secrets of an environment (this process's), longest first: one may be part of another."""
    found = [
        Secret(name, value)
        for name, value in (os.environ if environment is None else environment).items()
        if _NAME.search(name) and len(value) >= _SHORTEST
    ]
    return tuple(sorted(found, key=lambda secret: (-len(secret.value), secret.name)))


def hide(text: str, secrets: tuple[Secret, ...] | None = None) -> str:
    """The text with `HIDDEN` in place of every secret (of this process's environment)."""
    for secret in find_secrets() if secrets is None else secrets:
        text = text.replace(secret.value, HIDDEN)
    return text
