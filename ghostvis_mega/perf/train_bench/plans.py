"""What one call of the training benchmark does: settings, rows, comparisons, and their data."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ghostvis_mega.perf.train_bench.rows import Bar, Ratio, Row


@dataclass(frozen=True)
class TextNeed:
    """A dataset of random tokens."""

    path: Path
    sample_length: int
    vocab_size: int
    samples: int


@dataclass(frozen=True)
class PictureNeed:
    """A dataset of real pictures."""

    path: Path
    pictures: int | None = None
    """Of easy-vqa, the first ones alone; None: all, and the stamps."""


@dataclass(frozen=True)
class Plan:
    """Rows and what they share."""

    settings: dict[str, Any] = field(default_factory=dict)
    """A run file's content; empty where the user names a file."""
    rows: tuple[Row, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    bars: tuple[Bar, ...] = ()
    data: tuple[TextNeed | PictureNeed, ...] = ()

    def with_more(self, rows: Iterable[Row], ratios: Iterable[Ratio]) -> "Plan":
        """The same with further rows and ratios."""
        return dataclasses.replace(self, rows=(*self.rows, *rows), ratios=(*self.ratios, *ratios))

    def needs(self, rows: Sequence[Row]) -> list[TextNeed | PictureNeed]:
        """The datasets that these rows name."""
        named = " ".join(setting for row in rows for setting in row.settings)
        return [need for need in self.data if f"data.train={need.path}" in named]

    def write(self, folder: Path) -> Path:
        """The settings as a run file."""
        path = folder / "preset.yaml"
        path.write_text(yaml.safe_dump(self.settings), encoding="utf-8")
        return path
