"""What a hostile file is: a name, the door it is brought to, and how it is made."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kit:
    """What the makers of files use.

    Args:
        canary: A file that no reader writes; commands inside of hostile files would.
        secret: A file outside of every case that no reader opens because a hostile file says so.
        tokenizer: A sound tokenizer file.
        dataset: A sound prepared dataset.
        picture: A sound PNG.
    """

    canary: Path
    secret: Path
    tokenizer: Path
    dataset: Path
    picture: bytes

    @property
    def command(self) -> str:
        """A shell command that writes the canary."""
        return f"touch {self.canary}"

    @property
    def pickle(self) -> bytes:
        """A pickle that runs `command` when it is loaded: opcodes, written by hand."""
        return b"cposix\nsystem\n(V" + self.command.encode() + b"\ntR."


@dataclass(frozen=True)
class Case:
    """One hostile file or folder."""

    name: str
    door: str
    """Method of `Doors`."""
    make: Callable[[Kit, Path], Path]
    """Writes it into an empty folder; returns what the door is given."""


def put(path: Path, content: bytes | str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_json(path: Path, value: Any) -> Path:
    """Write JSON."""
    return put(path, json.dumps(value))


def deep(levels: int = 200_000, *, open_: str = "[", close: str = "]") -> str:
    """Brackets inside of brackets."""
    return open_ * levels + close * levels
